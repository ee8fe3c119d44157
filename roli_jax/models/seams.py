"""The three places where a method may enter a backbone."""

import dataclasses
from collections.abc import Callable

from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class Seams:
  """Module factories that a backbone calls; the defaults leave it as it is.

  A method's modules keep their arrays in the collection `peft`, so that the
  tree of pretrained parameters is the same under every method.

  Attributes:
    dense: makes the q, k and v projections, called as `nn.Dense` is; its
      `name` says which one it makes. In a ConvNeXt, the pointwise layers.
    branch: makes what follows a block's second branch, before the sum.
    tokens: makes a block's prompts: called with the block's tokens
      [b, n, d], it returns [b, p, d]. They stand after the class token, or in
      front of each window, and what a block makes of them is replaced by the
      next block's.
  """

  dense: Callable[..., nn.Module] = nn.Dense
  branch: Callable[..., nn.Module] | None = None
  tokens: Callable[..., nn.Module] | None = None
