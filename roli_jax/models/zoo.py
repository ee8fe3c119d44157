"""The backbones by name: their sizes, and how they want their images."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from roli_jax.models import layers, mobile
from roli_jax.models.coatnet import Coatnet
from roli_jax.models.families import (
  CIFAR,
  FAMILIES,
  HALF,
  IMAGENET,
  RAW,
  Normalisation,
  Sizes,
)
from roli_jax.models.mobile import MobileNet
from roli_jax.models.preact import PreactResNet
from roli_jax.models.resnet import ResNet
from roli_jax.models.stem import Convs
from roli_jax.models.vit import Vit
from roli_jax.models.xcit import Xcit

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
    image_size: side in pixels of the images that it was trained on; None: it
      must be told.
  """

  backbone: Callable[..., nn.Module]
  normalisation: Normalisation = IMAGENET
  image_size: int | None = 224


_VITS: dict[str, Sizes] = {
  "ti": {"width": 192, "depth": 12, "heads": 3},
  "s": {"width": 384, "depth": 12, "heads": 6},
  "b": {"width": 768, "depth": 12, "heads": 12},
  "l": {"width": 1024, "depth": 24, "heads": 16},
}
_SWINS: dict[str, Sizes] = {
  "t": {"width": 96, "depth": (2, 2, 6, 2), "heads": (3, 6, 12, 24)},
  "s": {"width": 96, "depth": (2, 2, 18, 2), "heads": (3, 6, 12, 24)},
  "b": {"width": 128, "depth": (2, 2, 18, 2), "heads": (4, 8, 16, 32)},
  "l": {"width": 192, "depth": (2, 2, 18, 2), "heads": (6, 12, 24, 48)},
}
_CONVNEXTS: dict[str, Sizes] = {
  "t": {"width": (96, 192, 384, 768), "depth": (3, 3, 9, 3)},
  "s": {"width": (96, 192, 384, 768), "depth": (3, 3, 27, 3)},
  "b": {"width": (128, 256, 512, 1024), "depth": (3, 3, 27, 3)},
  "l": {"width": (192, 384, 768, 1536), "depth": (3, 3, 27, 3)},
}
# Of Singh et al. 2023: width and stride of each convolution before the blocks.
_CVSTS: dict[str, tuple[str, Sizes, Convs]] = {
  **{
    f"vit_{size}16_cvst": (
      "vit",
      {**_VITS[size], "patch": 16},
      ((48, 2), (96, 2), (192, 2), (384, 2)),
    )
    for size in ("s", "b")
  },
  **{
    f"convnext_{size}_cvst": ("convnext", _CONVNEXTS[size], convs)
    for size, convs in (
      ("t", ((48, 2), (96, 2))),
      ("s", ((48, 2), (96, 2))),
      ("b", ((64, 2), (96, 2), (128, 1))),
      ("l", ((96, 2), (144, 2), (192, 1))),
    )
  },
}
# Width, depth, number of heads.
_XCITS = {"s12": (384, 12, 8), "m12": (512, 12, 8), "l12": (768, 12, 16)}
# Depths, whether of bottlenecks, inner width of the first stage.
_RESNETS: dict[str, tuple[tuple[int, ...], bool, int]] = {
  "resnet18": ((2, 2, 2, 2), False, 64),
  "resnet34": ((3, 4, 6, 3), False, 64),
  "resnet50": ((3, 4, 6, 3), True, 64),
  "resnet101": ((3, 4, 23, 3), True, 64),
  "resnet152": ((3, 8, 36, 3), True, 64),
  "wide_resnet50_2": ((3, 4, 6, 3), True, 128),
  "wide_resnet50_4": ((3, 4, 6, 3), True, 256),
}
# Of images of 32 x 32; the width of the stem.
_CIFAR_RESNETS = {
  "cifar_resnet18": ("resnet18", 64),
  "cifar_resnet18_w128": ("resnet18", 128),
  "cifar_resnet50": ("resnet50", 64),
}
_WRNS = {
  "wrn": (
    (28, 4), (28, 10), (34, 10), (34, 15), (34, 20), (40, 2), (70, 16),
  ),
  "dm_wrn": (
    (28, 10), (34, 10), (34, 20), (70, 16), (82, 8), (94, 16), (106, 16),
  ),
}  # fmt: skip
_RA_WRN: dict[str, Any] = {
  "depths": (30, 31, 10), "widths": (216, 432, 864), "width": 96,
  "act": jax.nn.silu, "same": True, "squeeze": 4,
}  # fmt: skip
# Attributes of `PreactResNet`. Those without a number of their own stages are
# the 18 layers of He et al. 2016.
_RESNET18: dict[str, Any] = {
  "depths": (2, 2, 2, 2), "widths": (64, 128, 256, 512), "width": 64,
}  # fmt: skip
_PREACTS: dict[str, dict[str, Any]] = {
  "preact_resnet18": _RESNET18,
  "preact_resnet18_v1": {**_RESNET18, "raw": True, "last_norm": False},
  "dm_preact_resnet18": {
    **_RESNET18, "act": jax.nn.silu, "same": True, "raw": True, "reach": 3,
  },
  # Of Huang et al. 2021 and 2022: few blocks, or few channels, at the end.
  "wrn_34_r": {"depths": (5, 5, 5), "widths": (320, 640, 512)},
  "wrn_a4": {
    "depths": (27, 28, 13), "widths": (160, 448, 384), "act": jax.nn.silu,
  },
  # Of Peng et al. 2023.
  "ra_wrn_70_16": _RA_WRN,
  # Of Amini et al. 2024.
  "meansparse_ra_wrn_70_16": {**_RA_WRN, "sparse": True},
}  # fmt: skip


# Depth, side of kernels, stride, factor within, width of each stage.
_EFFICIENT = (
  (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
  (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip


def _efficientnet(gates: bool, **options: Any) -> functools.partial[MobileNet]:
  """The smallest EfficientNet, with or without gates."""
  before = 32
  stages: list[tuple[mobile.Inverted, ...]] = []
  for depth, size, stride, factor, width in _EFFICIENT:
    inputs = (before, *(width,) * (depth - 1))
    hidden = [factor * n for n in inputs]
    squeezed = [n // 4 for n in inputs] if gates else []
    stages.append(mobile.stage(size, stride, width, hidden, squeezed))
    before = width
  return functools.partial(
    MobileNet, tuple(stages), 32, 1280, eps=1e-3, same=True, **options
  )


_MOBILES: dict[str, Callable[..., nn.Module]] = {
  "efficientnet_b0": _efficientnet(True, squeeze_act=jax.nn.silu),
  "efficientnet_lite0": _efficientnet(False, act=jax.nn.relu6),
  "mobilenetv3_l": functools.partial(
    MobileNet,
    (
      mobile.stage(3, 1, 16, (16,)),
      mobile.stage(3, 2, 24, (64, 72)),
      mobile.stage(5, 2, 40, (72, 120, 120), (24, 32, 32)),
      mobile.stage(3, 2, 80, (240, 200, 184, 184)),
      mobile.stage(3, 1, 112, (480, 672), (120, 168)),
      mobile.stage(5, 2, 160, (672, 960, 960), (168, 240, 240)),
    ),
    16,
    960,
    1280,
    act=jax.nn.hard_swish,
    early=3,
    gate=jax.nn.hard_sigmoid,
  ),
}


# Of timm's own, which differ in more than their sizes.
_COATNETS: dict[str, dict[str, Any]] = {
  "coatnet_0_rw": {
    "depths": (2, 3, 7, 2), "widths": (96, 192, 384, 768),
    "stem_widths": (32, 64),
    "pooled": True, "squeeze_first": True, "squeeze_act": jax.nn.relu,
    "shortcut_bias": False,
  },
  "coatnet_2_rw": {
    "depths": (2, 6, 14, 2), "widths": (128, 256, 512, 1024),
    "stem_widths": (64, 128),
  },
}  # fmt: skip


def _family(
  name: str, sizes: Sizes, **options: Any
) -> functools.partial[nn.Module]:
  """One of a family; a ViT, Swin or ConvNeXt has patches of 4 unless said."""
  patch = {"patch": 4} if "patch" in FAMILIES[name].attributes else {}
  return FAMILIES[name].backbone({**patch, **sizes}, **options)


def _eva(width: int, depth: int, num_heads: int, **options: Any) -> Any:
  """An EVA-02 (Fang et al. 2024), by default of patches of 14."""
  return functools.partial(
    Vit,
    width=width,
    depth=depth,
    num_heads=num_heads,
    hidden=8 * width // 3,
    pool="mean",
    fc_norm=True,
    eva=True,
    act=jax.nn.silu,
    **{"patch": 14, **options},
  )


_TINY = {"patch": 2, "width": 32, "depth": 2, "heads": 2}
# Of 8 x 8 grey images. The first has weights that come with the package; the
# others are toys of each family, to try a whole run with.
_GLYPHS: dict[str, Callable[..., nn.Module]] = {
  "glyph_vit": _family(
    "vit",
    {"patch": 2, "width": 64, "depth": 4, "heads": 4},
    pool="mean",
    cls=False,
    attention="xla",
    act=layers.erfc_gelu,
  ),
  "glyph_vit_token": _family("vit", _TINY),
  "glyph_deit": _family(
    "vit", _TINY, registers=2, cls_positions=False, scaled=True
  ),
  "glyph_eva": _eva(32, 2, 2, patch=2, gate_norm=True),
  "glyph_clip": _family("vit", _TINY, clip=True, eps=1e-5),
  "glyph_swin": _family(
    "swin", {"patch": 1, "width": 16, "depth": (2, 2), "heads": (2, 4)}
  ),
  "glyph_convnext": _family(
    "convnext", {"patch": 1, "width": (16, 32), "depth": (2, 2)}
  ),
  "glyph_vit_stem": _family("vit", _TINY, stem=((8, 2), (16, 1))),
  "glyph_convnext_stem": _family(
    "convnext",
    {"patch": 2, "width": (16, 32), "depth": (2, 2)},
    stem=((8, 2), (16, 1)),
  ),
  "glyph_xcit": functools.partial(Xcit, 32, 2, 2, patch=2),
  "glyph_resnet": functools.partial(
    ResNet, (2, 2), False, inner=16, small=True, width=16
  ),
  "glyph_wrn": _family("wrn", {"depth": 16, "width": 1}),
  "glyph_regnet": functools.partial(
    ResNet, (1, 3), True, width=16, group=8, widths=(16, 32)
  ),
  "glyph_coatnet": functools.partial(
    Coatnet, (2, 2), (32, 32), (8, 16), stride=1
  ),
  "glyph_mobile": functools.partial(
    MobileNet,
    (
      mobile.stage(3, 1, 8, (8,)),
      mobile.stage(3, 2, 16, (16, 32, 32), (4, 8, 8)),
    ),
    8,
    24,
    32,
    act=jax.nn.hard_swish,
    early=1,
    gate=jax.nn.hard_sigmoid,
  ),
  "glyph_preact": functools.partial(
    PreactResNet,
    (3, 1, 1, 1),
    (8, 16, 16, 16),
    8,
    jax.nn.silu,
    same=True,
    raw=True,
    reach=3,
  ),
}

MODELS: dict[str, Entry] = {
  **{
    f"vit_{size}{patch}": Entry(_family("vit", {**sizes, "patch": patch}), HALF)
    for size, sizes in _VITS.items()
    for patch in (16, 32)
  },
  **{
    f"deit_{size}16": Entry(_family("vit", {**_VITS[size], "patch": 16}))
    for size in ("ti", "s", "b")
  },
  **{
    f"swin_{size}": Entry(_family("swin", sizes))
    for size, sizes in _SWINS.items()
  },
  # Of Xu et al. 2024; of equal tensors the others come first.
  **{
    f"mimir_swin_{size}": Entry(
      _family("swin", _SWINS[size], window=window, eps=1e-6), RAW
    )
    for size, window in (("b", None), ("l", 14))
  },
  **{
    f"convnext_{size}": Entry(_family("convnext", sizes))
    for size, sizes in _CONVNEXTS.items()
  },
  # Of Amini et al. 2024.
  "meansparse_swin_l": Entry(_family("swin", _SWINS["l"], sparse=True)),
  "meansparse_convnext_l": Entry(
    _family("convnext", _CONVNEXTS["l"], sparse=True)
  ),
  **{
    name: Entry(_family(family, sizes, stem=convs), RAW)
    for name, (family, sizes, convs) in _CVSTS.items()
  },
  **{
    f"xcit_{size}": Entry(functools.partial(Xcit, *sizes))
    for size, sizes in _XCITS.items()
  },
  # After the others, which a file of their sizes is taken for.
  **{
    f"xcit_{size}_cifar": Entry(
      functools.partial(Xcit, *sizes, patch=4), CIFAR, 32
    )
    for size, sizes in _XCITS.items()
  },
  **{
    name: Entry(functools.partial(ResNet, *sizes))
    for name, sizes in _RESNETS.items()
  },
  **{
    f"{family}_{depth}_{width}": Entry(
      _family(family, {"depth": depth, "width": width}), CIFAR, 32
    )
    for family, sizes in _WRNS.items()
    for depth, width in sizes
  },
  # After the plain ones, which a file of their sizes is taken for.
  **{
    f"meansparse_dm_wrn_{depth}_{width}": Entry(
      _family("dm_wrn", {"depth": depth, "width": width}, sparse=True),
      CIFAR,
      32,
    )
    for depth, width in ((70, 16), (94, 16))
  },
  **{
    name: Entry(functools.partial(PreactResNet, **attributes), CIFAR, 32)
    for name, attributes in _PREACTS.items()
  },
  **{
    name: Entry(
      functools.partial(
        ResNet, *_RESNETS[like][:2], inner=width, small=True, width=width
      ),
      CIFAR,
      32,
    )
    for name, (like, width) in _CIFAR_RESNETS.items()
  },
  **{name: Entry(backbone) for name, backbone in _MOBILES.items()},
  "regnetx_004": Entry(
    functools.partial(
      ResNet,
      (1, 2, 7, 12),
      True,
      width=32,
      group=16,
      widths=(32, 64, 160, 384),
    )
  ),
  # As ARES trained it; a file does not tell it from the one with ReLU.
  "wide_resnet50_2_gelu": Entry(
    functools.partial(ResNet, *_RESNETS["wide_resnet50_2"], act=layers.gelu)
  ),
  **{
    f"clip_vit_{size}{patch}": Entry(
      _family("vit", {**_VITS[size], "patch": patch}, clip=True, eps=1e-5), CLIP
    )
    for size, patch in (("b", 16), ("b", 32), ("l", 14))
  },
  **{
    name: Entry(functools.partial(Coatnet, **attributes), HALF)
    for name, attributes in _COATNETS.items()
  },
  "eva02_ti14": Entry(_eva(192, 12, 3), CLIP),
  "eva02_b14": Entry(_eva(768, 12, 12, gate_norm=True), CLIP),
  # Of photographs.
  "tiny32": Entry(
    _family(
      "vit",
      {"patch": 8, "width": 128, "depth": 7, "heads": 4},
      pool="mean",
      cls=False,
    ),
    IMAGENET,
    image_size=32,
  ),
  **{
    name: Entry(backbone, GLYPHS, image_size=8)
    for name, backbone in _GLYPHS.items()
  },
}
