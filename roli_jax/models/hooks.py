"""The places where a method may enter a backbone."""

import dataclasses
from collections.abc import Callable

import jax
from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class Hooks:
  """Module factories that a backbone calls; the defaults leave it as it is.

  A method's modules keep their arrays in the collection `peft`, so that the
  tree of pretrained parameters is the same under every method.

  Attributes:
    dense: makes the q, k and v projections, called as `nn.Dense` is; its
      `name` says which one it makes. In a ConvNeXt, makes the pointwise layers.
    kernel: replaces the kernel of a convolution of a ResNet's blocks: called
      with the convolution, a module, and its own kernel [i, j, c, d], it
      returns one of the same shape.
    branch: makes the module that follows a block's second branch, before the
      sum, called as `branch(name=...)`.
    tokens: makes the module of a block's prompts, called as
      `tokens(fan=..., name=...)`; fan is the count of a patch's numbers plus a
      token's width. The module maps the block's tokens [b, n, d] to prompts
      [b, p, d], which stand after the class token, or in front of each window.
    deep: whether every block has prompts of its own, which replace the tokens
      that the block before has computed from its own. Otherwise the first
      block's go all the way.
    mixed: whether a Swin gives an image's windows the prompts of other images,
      and averages over them, as the RoLI reference does by mistake.
  """

  dense: Callable[..., nn.Module] = nn.Dense
  kernel: Callable[[nn.Module, jax.Array], jax.Array] | None = None
  branch: Callable[..., nn.Module] | None = None
  tokens: Callable[..., nn.Module] | None = None
  deep: bool = True
  mixed: bool = False
