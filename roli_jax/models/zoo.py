"""The backbones by name: their sizes, and how they want their images."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from roli_jax.models import layers
from roli_jax.models.convnext import ConvNext
from roli_jax.models.resnet import ResNet, WideResNet
from roli_jax.models.swin import Swin
from roli_jax.models.vit import Vit

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
CLIP = (
  (0.48145466, 0.4578275, 0.40821073),
  (0.26862954, 0.26130258, 0.27577711),
)
# Of the rendered letters, which are grey.
GLYPHS = ((0.35,), (0.39,))


@dataclasses.dataclass(frozen=True)
class Entry:
  """A named backbone.

  Attributes:
    backbone: makes it; takes `hooks` and the options of `models.create`.
    normalisation: mean and standard deviation per channel, of images in
      [0, 1], that its family was mostly trained with. Those of a file of
      weights go before.
    image_size: side in pixels of the images that it was trained on.
  """

  backbone: Callable[..., nn.Module]
  normalisation: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
  image_size: int = 224


def _vit(
  width: int, depth: int, num_heads: int, patch: int, **more: Any
) -> functools.partial[Vit]:
  """A ViT whose MLPs are four times as wide as its tokens."""
  return functools.partial(
    Vit, patch, width, depth, num_heads, 4 * width, **more
  )


# Width, depth, number of heads.
_VITS: dict[str, tuple[int, int, int]] = {
  "ti": (192, 12, 3),
  "s": (384, 12, 6),
  "b": (768, 12, 12),
  "l": (1024, 24, 16),
}
# Width of the first stage; depths and numbers of heads of all.
_SWINS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
  "t": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
  "s": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
  "b": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
}
# Widths and depths of the stages.
_CONVNEXTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
  "t": ((96, 192, 384, 768), (3, 3, 9, 3)),
  "s": ((96, 192, 384, 768), (3, 3, 27, 3)),
  "b": ((128, 256, 512, 1024), (3, 3, 27, 3)),
  "l": ((192, 384, 768, 1536), (3, 3, 27, 3)),
}
# Depths, whether of bottlenecks, inner width of the first stage.
_RESNETS: dict[str, tuple[tuple[int, ...], bool, int]] = {
  "resnet18": ((2, 2, 2, 2), False, 64),
  "resnet34": ((3, 4, 6, 3), False, 64),
  "resnet50": ((3, 4, 6, 3), True, 64),
  "resnet101": ((3, 4, 23, 3), True, 64),
  "wide_resnet50_2": ((3, 4, 6, 3), True, 128),
}
# dm: DeepMind's, as most of RobustBench's best on CIFAR are.
_WRNS: dict[str, dict[str, Any]] = {
  "wrn": {},
  "dm_wrn": {"act": jax.nn.silu, "same": True},
}

# Of 8 x 8 grey images. The first has weights that come with the package; the
# others are toys of each family, to try a whole run with.
_GLYPHS: dict[str, Callable[..., nn.Module]] = {
  "glyph_vit": _vit(
    64,
    4,
    4,
    patch=2,
    pool="mean",
    cls=False,
    attention="xla",
    act=layers.erfc_gelu,
  ),
  "glyph_vit_token": _vit(32, 2, 2, patch=2),
  "glyph_clip": _vit(32, 2, 2, patch=2, clip=True, eps=1e-5),
  "glyph_swin": functools.partial(Swin, 16, (2, 2), (2, 4), patch=1),
  "glyph_convnext": functools.partial(ConvNext, (16, 32), (2, 2), patch=1),
  "glyph_resnet": functools.partial(
    ResNet, (2, 2), False, inner=16, small=True, width=16
  ),
  "glyph_wrn": functools.partial(WideResNet, 16, 1),
}

MODELS: dict[str, Entry] = {
  **{
    f"vit_{size}{patch}": Entry(_vit(*sizes, patch=patch), HALF)
    for size, sizes in _VITS.items()
    for patch in (16, 32)
  },
  **{
    f"deit_{size}16": Entry(_vit(*_VITS[size], patch=16))
    for size in ("ti", "s", "b")
  },
  **{
    f"swin_{size}": Entry(functools.partial(Swin, *sizes))
    for size, sizes in _SWINS.items()
  },
  **{
    f"convnext_{size}": Entry(functools.partial(ConvNext, *sizes))
    for size, sizes in _CONVNEXTS.items()
  },
  **{
    name: Entry(functools.partial(ResNet, *sizes))
    for name, sizes in _RESNETS.items()
  },
  **{
    f"{family}_{depth}_{factor}": Entry(
      functools.partial(WideResNet, depth, factor, **options), CIFAR, 32
    )
    for family, options in _WRNS.items()
    for depth, factor in ((28, 10), (34, 10), (70, 16))
  },
  # As ARES trained it; a file does not tell it from the one with ReLU.
  "wide_resnet50_2_gelu": Entry(
    functools.partial(ResNet, *_RESNETS["wide_resnet50_2"], act=layers.gelu)
  ),
  "clip_vit_b16": Entry(_vit(768, 12, 12, 16, clip=True, eps=1e-5), CLIP),
  **{
    name: Entry(backbone, GLYPHS, image_size=8)
    for name, backbone in _GLYPHS.items()
  },
}
