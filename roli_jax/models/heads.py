"""Classifiers on pooled features."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from roli_jax.types import Array, Float

HEAD_INITS = ("kaiming_fan_out", "small")
LOGIT_SCALE = math.log(1 / 0.07)  # where CLIP's training starts


@dataclasses.dataclass(frozen=True)
class _Normal:
  """Draws from N(0, stddev^2).

  Equal ones make equal heads, which share compiled programs; flax's own
  initializers are equal to themselves alone.
  """

  stddev: float

  def __call__(
    self,
    key: jax.Array,
    shape: Sequence[int],
    dtype: jax.typing.DTypeLike = jnp.float32,
  ) -> jax.Array:
    return nn.initializers.normal(self.stddev)(key, shape, dtype)


_SMALL = _Normal(0.02)
# Each class begins with a probability of 1%, taken by itself (as a sigmoid).
_RARE = nn.initializers.constant(-math.log(99))


def linear(num_classes: int, init: str = "kaiming_fan_out") -> nn.Dense:
  """A linear head, `[b, d] -> [b, num_classes]`.

  Args:
    num_classes: at least 2.
    init: how its weights start. `kaiming_fan_out`: N(0, 2 / num_classes), bias
      -ln 99, the RoLI reference's random head, much larger than usual.
      `small`: N(0, 0.02^2), bias 0, as in timm's vision transformers.

  Raises:
    ValueError: fewer classes, or an unknown init.
  """
  if num_classes < 2:
    raise ValueError(f"a head needs at least 2 classes, got {num_classes}")
  if init not in HEAD_INITS:
    raise ValueError(f"unknown head_init {init!r}; there are {HEAD_INITS}")
  if init == "small":
    return nn.Dense(num_classes, kernel_init=_SMALL)
  spread = _Normal(math.sqrt(2 / num_classes))
  return nn.Dense(num_classes, kernel_init=spread, bias_init=_RARE)


def projection(width: int) -> nn.Dense:
  """A linear map without bias, `[b, d] -> [b, width]`: CLIP's embedding."""
  return nn.Dense(width, use_bias=False)


class Cosine(nn.Module):
  """exp(logit_scale) times the cosines with the classes' unit vectors.

  Features are projected, brought to length 1, and multiplied with a column a
  class: CLIP's zero-shot classifier (Radford et al. 2021, section 3.1.2). The
  columns are not brought to length 1 in the pass: in training they, and the
  scale, go where they will.

  Attributes:
    num_classes: at least 2.
    embed: the width that images and texts share.
  """

  num_classes: int
  embed: int

  @nn.compact
  def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b k"]:
    x = unit(nn.Dense(self.embed, use_bias=False, name="projection")(x))
    kernel = self.param(
      "kernel", nn.initializers.lecun_normal(), (self.embed, self.num_classes)
    )
    scale = self.param("logit_scale", nn.initializers.constant(LOGIT_SCALE), ())
    return jnp.exp(scale) * (x @ kernel)


class Pair(nn.Module):
  """The mean of two linear heads, one on each half of the features.

  A distilled ViT's are its two class tokens (Touvron et al. 2021).

  Attributes:
    num_classes: at least 2.
  """

  num_classes: int

  @nn.compact
  def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b k"]:
    halves = zip(("cls", "dist"), jnp.split(x, 2, -1), strict=True)
    each = [
      nn.Dense(self.num_classes, name=name)(half) for name, half in halves
    ]
    return (each[0] + each[1]) / 2


def pair(linear: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """The parameters of `Pair` that compute what those of a linear head do."""
  halves = np.split(2 * np.asarray(linear["kernel"]), 2)
  return {
    name: {**linear, "kernel": half}
    for name, half in zip(("cls", "dist"), halves, strict=True)
  }


def cosine(num_classes: int, embed: int) -> Cosine:
  """A zero-shot head, `[b, d] -> [b, num_classes]`; see `Cosine`."""
  if num_classes < 2:
    raise ValueError(f"a head needs at least 2 classes, got {num_classes}")
  return Cosine(num_classes, embed)


def unit(x: Float[Array | np.ndarray, "*b d"]) -> Float[Array, "*b d"]:
  """Vectors at length 1; one of (almost) no length becomes zeros."""
  squared = (x * x).sum(-1, keepdims=True)
  known = squared > 1e-24
  # Twice `where`: at zeros the gradient must be finite too.
  length = jnp.sqrt(jnp.where(known, squared, 1.0))
  return jnp.where(known, x / length, 0.0)
