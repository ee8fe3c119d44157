"""Modules that methods add to a backbone, with arrays in the collection `peft`.

LoRA: Hu et al. 2022. Adapters: Pfeiffer et al. 2021, after the MLP alone.
Prompts: Jia et al. 2022 (VPT).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from roli_jax.models.layers import gelu
from roli_jax.types import Array, Float, Key

ZEROS = nn.initializers.zeros
# U(+-1 / sqrt(fan in)), as PyTorch begins a linear layer.
UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# `(key, shape) -> array`, as in `nn.initializers`.
Init = Callable[..., jax.Array]


def _leaf(module: nn.Module, name: str, init: Init, *shape: int) -> Any:
  """Returns an array of the collection `peft`, made by `init` at the start."""
  return module.variable(
    "peft", name, lambda: init(module.make_rng("params"), shape)
  ).value


def _dropped(
  module: nn.Module, x: Float[Array, "*any"], rate: float | int
) -> Float[Array, "*any"]:
  """Applies dropout in training, which is where there are keys for it."""
  trains = module.has_rng("dropout")
  return nn.Dropout(rate, deterministic=not trains)(x)


def _affine(
  x: Float[Array, "... d"],
  kernel: Float[Array | np.ndarray, "d e"],
  bias: Float[Array | np.ndarray, " e"],
) -> Float[Array, "... e"]:
  return x @ kernel + bias.reshape((1,) * (x.ndim - 1) + (-1,))


class LoraDense(nn.Module):
  """A dense layer, `kernel` and `bias`, plus scale x a b; b starts at zero.

  (A class of its own, since the checks of the tests can't read the annotations
  of `nn.Dense`.)

  Attributes:
    features: the width of the output, e.
    rank: the rank of the product a b, with a [d, rank] and b [rank, e], >= 1.
    scale: the factor of the product.
    a_init: the initializer of a.
    dropout: the rate of dropout of x before a in training, in [0, 1).
    passing: whether the product exists in training alone, which is where there
      are keys for dropout.
  """

  features: int
  rank: int
  scale: float | int
  a_init: Init = UNIFORM
  dropout: float | int = 0.0
  passing: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... e"]:
    kernel = self.param(
      "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features)
    )
    bias = self.param("bias", ZEROS, (self.features,))
    a = _leaf(self, "a", self.a_init, x.shape[-1], self.rank)
    b = _leaf(self, "b", ZEROS, self.rank, self.features)
    plain = _affine(x, kernel, bias)
    if self.passing and not self.has_rng("dropout"):
      return plain
    return plain + self.scale * (_dropped(self, x, self.dropout) @ a @ b)


def lora_kernel(
  module: nn.Module,
  kernel: Float[Array | np.ndarray, "i j c d"],
  rank: int,
  scale: float | int,
  a_init: Init,
  passing: bool = False,
) -> Float[Array | np.ndarray, "i j c d"]:
  """Returns a convolution's kernel plus scale a b.

  Args:
    module: the convolution, which gets the arrays a [i j c, rank], b [rank, d].
    kernel: its kernel.
    rank: the rank of the product, >= 1.
    scale: the factor of the product.
    a_init: the initializer of a; b starts at zero.
    passing: whether the product exists in training alone, which is where there
      are keys for dropout.
  """
  a = _leaf(module, "a", a_init, math.prod(kernel.shape[:3]), rank)
  b = _leaf(module, "b", ZEROS, rank, kernel.shape[3])
  if passing and not module.has_rng("dropout"):
    return kernel
  return kernel + scale * (a @ b).reshape(kernel.shape)


class Adapter(nn.Module):
  """y + up(gelu(down(y))); up starts at zero.

  Attributes:
    reduction: the width inside is d / reduction, rounded down, at least 1.
    down_init: the initializer of down's kernel.
  """

  reduction: int
  down_init: Init = UNIFORM

  @nn.compact
  def __call__(self, y: Float[Array, "... d"]) -> Float[Array, "... d"]:
    width = y.shape[-1]
    down = _Dense(max(width // self.reduction, 1), self.down_init, name="down")
    up = _Dense(width, ZEROS, name="up")
    return y + up(gelu(down(y)))


class _Dense(nn.Module):
  width: int
  kernel_init: Init

  @nn.compact
  def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... e"]:
    kernel = _leaf(self, "kernel", self.kernel_init, x.shape[-1], self.width)
    bias = _leaf(self, "bias", ZEROS, self.width)
    return _affine(x, kernel, bias)


class Prompts(nn.Module):
  """A block's prompts, the same for each image but for dropout.

  They start uniformly in +- sqrt(6 / fan), the bound of Glorot & Bengio 2010
  for the patch embedding, in all blocks.

  Attributes:
    tokens: the number of prompts p, >= 1.
    fan: fan in plus fan out of the patch embedding, see `Hooks.tokens`.
    dropout: the rate of dropout in training, drawn for each image by itself.
  """

  tokens: int
  fan: int
  dropout: float | int

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b p d"]:
    bound = math.sqrt(6 / self.fan)

    def init(key: Key[Array, ""], shape: tuple[int, ...]) -> jax.Array:
      return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    prompt = _leaf(self, "prompt", init, self.tokens, x.shape[-1])
    prompts = jnp.repeat(prompt[None].astype(x.dtype), len(x), 0)
    return _dropped(self, prompts, self.dropout)
