"""What methods put into a backbone; their arrays are in the collection `peft`.

LoRA: Hu et al. 2022. Adapters: Pfeiffer et al. 2021, after the MLP alone.
Prompts: Jia et al. 2022 (VPT), deep: each block has its own.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from roli_jax.models import Seams
from roli_jax.models.layers import gelu
from roli_jax.types import Array, Float

_zeros = nn.initializers.zeros
# U(+-1 / sqrt(fan in)), as PyTorch begins a linear layer.
_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _leaf(
  module: nn.Module, name: str, init: Callable[..., Any], *shape: int
) -> jax.Array:
  """An array of a method, of its own where the module's are the backbone's."""
  return module.variable(
    "peft", name, lambda: init(module.make_rng("params"), shape)
  ).value


class LoraDense(nn.Module):
  """A dense layer, `kernel` and `bias`, plus (alpha / rank) x a b.

  a starts uniformly, b at zero. (A class of its own, since the checks of the
  tests can't read the annotations of `nn.Dense`.)

  Attributes:
    features: the width after it.
    rank: of the product.
    alpha: its scale, times the rank.
  """

  features: int
  rank: int
  alpha: float | int

  @nn.compact
  def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... e"]:
    kernel = self.param(
      "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features)
    )
    bias = self.param("bias", _zeros, (self.features,))
    a = _leaf(self, "a", _uniform, x.shape[-1], self.rank)
    b = _leaf(self, "b", _zeros, self.rank, self.features)
    return _affine(x, kernel, bias) + self.alpha / self.rank * (x @ a @ b)


def _affine(x, kernel, bias):
  return x @ kernel + bias.reshape((1,) * (x.ndim - 1) + (-1,))


class Adapter(nn.Module):
  """y + up(gelu(down(y))); up starts at zero.

  Attributes:
    reduction: of the width inside.
  """

  reduction: int

  @nn.compact
  def __call__(self, y: Float[Array, "... d"]) -> Float[Array, "... d"]:
    width = y.shape[-1]
    inner = width // self.reduction
    down = _Dense(inner, _uniform, name="down")
    up = _Dense(width, _zeros, name="up")
    return y + up(gelu(down(y)))


class _Dense(nn.Module):
  width: int
  init: Callable[..., Any]

  @nn.compact
  def __call__(self, x):
    kernel = _leaf(self, "kernel", self.init, x.shape[-1], self.width)
    bias = _leaf(self, "bias", _zeros, self.width)
    return _affine(x, kernel, bias)


class Prompts(nn.Module):
  """A block's prompts, the same for each image.

  Attributes:
    tokens: how many.
    bound: they start uniformly in +- this.
  """

  tokens: int
  bound: float

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b p d"]:
    def init(key, shape):
      return jax.random.uniform(key, shape, jnp.float32, -1, 1) * self.bound

    prompt = _leaf(self, "prompt", init, self.tokens, x.shape[-1])
    return jnp.repeat(prompt[None].astype(x.dtype), len(x), 0)


def _lora_of_q_and_v(
  features: int, *, name: str, rank: int, alpha: float | int
):
  if name in ("q", "v"):
    return LoraDense(features, rank, alpha, name=name)
  return nn.Dense(features, name=name)


def lora(rank: int = 16, alpha: float | int = 16) -> Seams:
  """LoRA of the queries and values of every block."""
  return Seams(
    dense=functools.partial(_lora_of_q_and_v, rank=rank, alpha=alpha)
  )


def adapter(reduction: int = 8) -> Seams:
  """An adapter after the MLP of every block."""
  return Seams(branch=functools.partial(Adapter, reduction))


def vpt(tokens: int = 10, patch: int = 16, width: int = 768) -> Seams:
  """Deep prompts.

  Args:
    tokens: in each block.
    patch: of the backbone, in pixels; with `width` it sets the start.
    width: of the backbone's first block.
  """
  bound = math.sqrt(6 / (3 * patch**2 + width))
  return Seams(tokens=functools.partial(Prompts, tokens, bound))
