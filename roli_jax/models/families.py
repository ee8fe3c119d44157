"""Families of backbones: each size is made from what its user says of it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn

from roli_jax.models.convnext import ConvNext
from roli_jax.models.preact import WideResNet
from roli_jax.models.swin import Swin
from roli_jax.models.vit import Vit

# By the names that users give them: `{"patch": 4, "width": 128, ...}`. A size
# that each stage has of its own is a tuple.
Sizes = Mapping[str, Any]
# Mean and standard deviation per channel, of images in [0, 1].
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
RAW = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))


@dataclasses.dataclass(frozen=True)
class Family:
  """Backbones that differ in their sizes.

  Attributes:
    name: as in `FAMILIES`.
    module: makes one from its attributes.
    attributes: the attribute that holds a size, by the size's name.
    staged: the sizes that each stage has of its own.
    check: raises a ValueError for sizes that don't fit one another.
    colours: mean and standard deviation of images of three channels, as most
      of the family were trained with.
    image_size: the side that most are trained with, in pixels; None: the arrays
      depend on it, so that it must be given.
  """

  name: str
  module: Callable[..., nn.Module]
  attributes: Mapping[str, str]
  staged: tuple[str, ...]
  check: Callable[..., None]
  colours: Normalisation
  image_size: int | None = None

  def backbone(
    self, sizes: Sizes, **options: Any
  ) -> functools.partial[nn.Module]:
    """What makes the backbone of these sizes; takes `hooks` and options.

    Args:
      sizes: all of the family's; a list counts as a tuple.
      **options: further attributes of the module.

    Raises:
      ValueError: a size that is missing, that the family hasn't, or that can't
        be.
    """
    takes = f"{self.name} takes {', '.join(self.attributes)}"
    if unknown := sorted(sizes.keys() - self.attributes.keys()):
      raise ValueError(f"{takes}, and no {', '.join(unknown)}")
    if missing := [k for k in self.attributes if k not in sizes]:
      raise ValueError(f"{takes}; there is no {', '.join(missing)}")
    checked: dict[str, Any] = {
      name: self._checked(name, sizes[name]) for name in sizes
    }
    stages = {name: checked[name] for name in self.staged}
    if len({len(numbers) for numbers in stages.values()}) > 1:
      raise ValueError(
        f"{self.name} has one number for each stage, got {stages}"
      )
    self.check(**checked)
    given = {self.attributes[name]: value for name, value in checked.items()}
    return functools.partial(self.module, **given, **options)

  def normalisation(self, channels: int) -> Normalisation:
    """Mean and deviation: `colours`, or of other than 3 channels 0.5 each.

    Raises:
      ValueError: fewer than one channel.
    """
    if channels < 1:
      raise ValueError(f"channels is a whole number >= 1, got {channels}")
    half = (0.5,) * channels
    return self.colours if channels == 3 else (half, half)

  def sizes(self, backbone: nn.Module) -> dict[str, Any]:
    """The sizes of one of the family, from which `backbone` makes it again."""
    return {
      name: getattr(backbone, attribute)
      for name, attribute in self.attributes.items()
    }

  def _checked(self, name: str, value: Any) -> int | tuple[int, ...]:
    staged = name in self.staged
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,)
    whole = all(isinstance(number, int) and number >= 1 for number in numbers)
    if isinstance(value, list | tuple) != staged or not whole or not numbers:
      one = "a tuple, for each stage one" if staged else "one"
      raise ValueError(
        f"{name} of {self.name} is {one} whole number >= 1, got {value!r}"
      )
    return numbers if staged else numbers[0]


def _vit(width: int, **attributes: Any) -> Vit:
  """A ViT whose MLPs are four times as wide as its tokens."""
  return Vit(width=width, hidden=4 * width, **attributes)


def _check_heads(width: int, heads: int, **_: int) -> None:
  if width % heads:
    raise ValueError(f"heads must divide the width {width}, got {heads}")


def _check_swin(
  width: int, depth: tuple[int, ...], heads: tuple[int, ...], patch: int
) -> None:
  del depth, patch
  for stage, number in enumerate(heads):
    _check_heads(width * 2**stage, number)


def _check_wrn(depth: int, width: int) -> None:
  if depth < 10 or depth % 6 != 4:
    raise ValueError(f"the depth of a WRN is 6 n + 4, as 28; got {depth}")


_TOKENS = {"patch": "patch", "width": "width"}
_WIDE = {"depth": "depth", "width": "factor"}

FAMILIES: dict[str, Family] = {
  family.name: family
  for family in (
    Family(
      "vit",
      _vit,
      {**_TOKENS, "depth": "depth", "heads": "num_heads"},
      (),
      _check_heads,
      HALF,
    ),
    Family(
      "swin",
      Swin,
      {**_TOKENS, "depth": "depths", "heads": "num_heads"},
      ("depth", "heads"),
      _check_swin,
      IMAGENET,
    ),
    Family(
      "convnext",
      ConvNext,
      {"patch": "patch", "width": "widths", "depth": "depths"},
      ("width", "depth"),
      lambda **_: None,
      IMAGENET,
      224,
    ),
    Family("wrn", WideResNet, _WIDE, (), _check_wrn, CIFAR, 32),
    # DeepMind's, as most of RobustBench's best on CIFAR are.
    Family(
      "dm_wrn",
      functools.partial(WideResNet, act=jax.nn.silu, same=True),
      _WIDE,
      (),
      _check_wrn,
      CIFAR,
      32,
    ),
  )
}
