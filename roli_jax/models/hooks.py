"""The places where a method may enter a backbone."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class Hooks:
  """Module factories that a backbone calls; the defaults leave it as it is.

  A method's modules keep their arrays in the collection `peft`, so that the
  tree of pretrained parameters is the same under every method.

  Attributes:
    dense: makes the q, k and v projections, called as `nn.Dense` is; its
      `name` says which one it makes. In a ConvNeXt, the pointwise layers.
    kernel: the kernel to use in a convolution of a ResNet's blocks: called
      with the convolution, a module, and its own kernel [i, j, c, d].
    branch: makes what follows a block's second branch, before the sum.
    tokens: makes a block's prompts, `tokens(fan=..., name=...)` with the
      weights that a patch's and a token's numbers have together: called with
      the block's tokens [b, n, d], it returns [b, p, d]. They stand after the
      class token, or in front of each window.
    deep: whether every block has prompts of its own, which replace what the
      block before has made of its own. Otherwise the first block's go all the
      way.
    mixed: whether a Swin hands an image's windows the prompts of others, and
      averages over them, as the RoLI reference does by mistake.
  """

  dense: Callable[..., nn.Module] = nn.Dense
  kernel: Callable[..., Any] | None = None
  branch: Callable[..., nn.Module] | None = None
  tokens: Callable[..., nn.Module] | None = None
  deep: bool = True
  mixed: bool = False
