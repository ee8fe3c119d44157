"""Vision transformer (Dosovitskiy et al. 2021)."""

import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from roli_jax.models import layers
from roli_jax.models.conv import Conv
from roli_jax.models.hooks import Hooks
from roli_jax.models.stem import Convs, ConvStem
from roli_jax.types import Array, Float

POOLS = ("token", "mean")


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)).

  Attributes:
    num_heads: divides the width of a token.
    hidden: the width inside the MLP.
    act: the GELU.
    eps: what the normalisations add to variances, > 0.
    attend: see `layers.Attention`.
    hooks: where a method may enter.
    start: the number of tokens in front of the prompts.
    first: computes only this many tokens m, from the first; None: all n. In the
      last block nobody reads the others where the feature is the class token.
  """

  num_heads: int
  hidden: int
  act: layers.Activation
  eps: float
  attend: Callable[..., jax.Array]
  hooks: Hooks = Hooks()
  start: int = 0
  first: int | None = None

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    prompts: layers.Prompts = None,
    rate: layers.Rate = 0.0,
  ) -> Float[Array, "b m d"]:
    """The tokens after the block.

    Args:
      x: the tokens before it.
      prompts: what a method puts in place of those after the first `start`.
      rate: the rate of `layers.drop_path`, in [0, 1).
    """
    if prompts is not None:
      end = self.start + prompts.shape[1]
      x = jnp.concatenate([x[:, : self.start], prompts, x[:, end:]], 1)
    y = nn.LayerNorm(epsilon=self.eps, name="norm1")(x)
    attention = layers.Attention(
      self.num_heads, self.attend, self.hooks, self.first, name="attn"
    )
    x = x[:, : self.first] + layers.drop_path(self, attention(y), rate)
    y = nn.LayerNorm(epsilon=self.eps, name="norm2")(x)
    y = layers.Mlp(self.hidden, act=self.act, name="mlp")(y)
    y = layers.drop_path(self, y, rate)
    if self.hooks.branch:
      y = self.hooks.branch(name="branch")(y)
    return x + y


class Vit(nn.Module):
  """A ViT; its feature is the class token, or the mean of all others.

  Attributes:
    patch: side of a patch in pixels; divides the image's sides.
    width: the width of a token.
    depth: number of blocks.
    num_heads: divides the width.
    hidden: the width inside the MLPs.
    pool: `token`: the class token is the feature; `mean`: the mean of the
      others.
    cls: whether there is a class token.
    fc_norm: whether the feature is normalised, and not the tokens before it.
    clip: whether patches have no bias, and a normalisation stands before the
      blocks, as in CLIP.
    stem: convolutions in place of the patches, of their stride: see `ConvStem`;
      one of 1 x 1 after them makes tokens. Empty: there are none.
    eps: what the normalisations add to variances, > 0.
    act: the GELU.
    hooks: where a method may enter.
    attention: which of `attentions`.
    drop_path: the last block's rate of `layers.drop_path`, in training.
    scan: see `layers.repeat`.
    remat: see `layers.repeat`.
  """

  patch: int
  width: int
  depth: int
  num_heads: int
  hidden: int
  pool: str = "token"
  cls: bool = True
  fc_norm: bool = False
  clip: bool = False
  stem: Convs = ()
  eps: float = 1e-6
  act: layers.Activation = layers.gelu
  hooks: Hooks = Hooks()
  attention: str = "plain"
  drop_path: float = 0.0
  scan: bool = False
  remat: bool = False
  attentions: ClassVar[tuple[str, ...]] = tuple(layers.ATTENTIONS)

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], *, train: bool = False
  ) -> Float[Array, "b d"]:
    del train  # no running statistics
    fan = self.patch**2 * x.shape[-1] + self.width
    x = self._embedded(x)
    start = int(self.cls)
    if self.cls:
      cls = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
      x = jnp.concatenate([jnp.repeat(cls, len(x), 0).astype(x.dtype), x], 1)
    x = x + self.param(
      "positions", nn.initializers.normal(0.02), (1, *x.shape[1:])
    )
    if self.clip:
      x = nn.LayerNorm(epsilon=self.eps, name="pre_norm")(x)
    num_prompted = self.depth if self.hooks.deep else 1
    added, prompts = layers.prompts(
      self.hooks, x, num_prompted, self.depth, fan
    )
    if added is not None:
      x = jnp.concatenate([x[:, :start], added, x[:, start:]], 1)
    attend = layers.ATTENTIONS[self.attention]
    make = functools.partial(
      Block, self.num_heads, self.hidden, self.act, self.eps, attend, self.hooks
    )
    (rates,) = layers.drop_rates(self.drop_path, [self.depth])
    alone = self.pool == "token"  # whether only the class token is read
    whole = self.depth - alone  # blocks that compute all tokens
    for first, part in ((None, slice(whole)), (start, slice(whole, None))):
      block = functools.partial(make, start, first)
      numbers, each = range(self.depth)[part], (prompts[part], rates[part])
      x = layers.repeat(
        self, block, numbers, x, *each, scan=self.scan, remat=self.remat
      )
    if not self.fc_norm:
      x = nn.LayerNorm(epsilon=self.eps, name="norm")(x)
    x = x[:, 0] if alone else x[:, start:].mean(1)
    if self.fc_norm:
      x = nn.LayerNorm(epsilon=self.eps, name="fc_norm")(x)
    return x

  def _embedded(self, x: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
    """The tokens of the image's patches."""
    if not self.stem:
      embed = layers.PatchEmbed(
        self.patch, self.width, use_bias=not self.clip, name="embed"
      )
      return embed(x)
    x = self.act(ConvStem(self.stem, act=self.act, name="embed")(x))
    x = Conv(self.width, 1, use_bias=True, name="embed_out")(x)
    return x.reshape(len(x), -1, self.width)
