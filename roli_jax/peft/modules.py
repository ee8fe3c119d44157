"""What methods put into a backbone; their arrays are in the collection `peft`.

LoRA: Hu et al. 2022. Adapters: Pfeiffer et al. 2021, after the MLP alone.
Prompts: Jia et al. 2022 (VPT).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from roli_jax.models.layers import gelu
from roli_jax.types import Array, Float

ZEROS = nn.initializers.zeros
# U(+-1 / sqrt(fan in)), as PyTorch begins a linear layer.
UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

Init = Callable[..., Any]


def _leaf(module: nn.Module, name: str, init: Init, *shape: int) -> Any:
  """An array of a method, of its own where the module's are the backbone's."""
  return module.variable(
    "peft", name, lambda: init(module.make_rng("params"), shape)
  ).value


def _dropped(module: nn.Module, x: Any, rate: float | int) -> Any:
  """x with dropout, in training."""
  trains = module.has_rng("dropout")
  return nn.Dropout(rate, deterministic=not trains)(x)


def _affine(x, kernel, bias):
  return x @ kernel + bias.reshape((1,) * (x.ndim - 1) + (-1,))


class LoraDense(nn.Module):
  """A dense layer, `kernel` and `bias`, plus scale x a b; b starts at zero.

  (A class of its own, since the checks of the tests can't read the annotations
  of `nn.Dense`.)

  Attributes:
    features: the width after it.
    rank: of the product.
    scale: of it.
    init: how a starts.
    dropout: of x before a, in training.
    passing: whether the product is there in training alone, which is where
      there are keys for dropout.
  """

  features: int
  rank: int
  scale: float | int
  init: Init = UNIFORM
  dropout: float | int = 0.0
  passing: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... e"]:
    kernel = self.param(
      "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features)
    )
    bias = self.param("bias", ZEROS, (self.features,))
    a = _leaf(self, "a", self.init, x.shape[-1], self.rank)
    b = _leaf(self, "b", ZEROS, self.rank, self.features)
    plain = _affine(x, kernel, bias)
    if self.passing and not self.has_rng("dropout"):
      return plain
    return plain + self.scale * (_dropped(self, x, self.dropout) @ a @ b)


def lora_kernel(
  module: nn.Module,
  kernel: Float[Array, "i j c d"],
  rank: int,
  scale: float | int,
  init: Init,
  passing: bool = False,
) -> Float[Array, "i j c d"]:
  """A convolution's kernel plus scale a b, a [i j c, rank], b [rank, d].

  If `passing`, the kernel alone where there are no keys for dropout.
  """
  a = _leaf(module, "a", init, math.prod(kernel.shape[:3]), rank)
  b = _leaf(module, "b", ZEROS, rank, kernel.shape[3])
  if passing and not module.has_rng("dropout"):
    return kernel
  return kernel + scale * (a @ b).reshape(kernel.shape)


class Adapter(nn.Module):
  """y + up(gelu(down(y))); up starts at zero.

  Attributes:
    reduction: of the width inside, which is at least 1.
    init: how the weights of down start.
  """

  reduction: int
  init: Init = UNIFORM

  @nn.compact
  def __call__(self, y: Float[Array, "... d"]) -> Float[Array, "... d"]:
    width = y.shape[-1]
    down = _Dense(max(width // self.reduction, 1), self.init, name="down")
    up = _Dense(width, ZEROS, name="up")
    return y + up(gelu(down(y)))


class _Dense(nn.Module):
  width: int
  init: Init

  @nn.compact
  def __call__(self, x):
    kernel = _leaf(self, "kernel", self.init, x.shape[-1], self.width)
    bias = _leaf(self, "bias", ZEROS, self.width)
    return _affine(x, kernel, bias)


class Prompts(nn.Module):
  """A block's prompts, the same for each image but for dropout.

  They start uniformly in +- sqrt(6 / fan), the bound of Glorot & Bengio 2010
  for the patch embedding, in all blocks.

  Attributes:
    tokens: how many.
    fan: see `Hooks.tokens`.
    dropout: in training, each image by itself.
  """

  tokens: int
  fan: int
  dropout: float | int

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b p d"]:
    bound = math.sqrt(6 / self.fan)

    def init(key, shape):
      return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    prompt = _leaf(self, "prompt", init, self.tokens, x.shape[-1])
    prompts = jnp.repeat(prompt[None].astype(x.dtype), len(x), 0)
    return _dropped(self, prompts, self.dropout)
