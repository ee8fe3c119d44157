"""Vision transformer (Dosovitskiy et al. 2021)."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from roli_jax.models import layers
from roli_jax.models.hooks import Hooks
from roli_jax.types import Array, Float

POOLS = ("token", "mean")


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)).

  With `first`, of that many tokens alone: nobody reads the others of the last
  block, where the feature is the class token.
  """

  num_heads: int
  hidden: int
  hooks: Hooks
  eps: float
  start: int
  attention: str
  act: Callable[..., Any]
  first: int | None = None

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    prompts: Float[Array, "b p d"] | None,
    rate: Any,
  ) -> Float[Array, "b m d"]:
    """The tokens after it.

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
      self.num_heads, self.hooks, self.attention, self.first, name="attn"
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
    hidden: width inside the MLPs.
    pool: `token`: the class token is the feature; `mean`: the mean of the
      others.
    cls: whether there is a class token.
    fc_norm: whether the feature is normalised, and not the tokens before it.
    clip: as CLIP has it: patches without bias, a normalisation before the
      blocks.
    eps: what the normalisations add to variances, > 0.
    act: the GELU.
    hooks: where a method may enter.
    attention: which of `layers.ATTENTIONS`.
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
  eps: float = 1e-6
  act: Callable[..., Any] = layers.gelu
  hooks: Hooks = Hooks()
  attention: str = "plain"
  drop_path: float = 0.0
  scan: bool = False
  remat: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], *, train: bool = False
  ) -> Float[Array, "b d"]:
    del train  # no running statistics
    fan = self.patch**2 * x.shape[-1] + self.width
    x = layers.PatchEmbed(
      self.patch, self.width, use_bias=not self.clip, name="embed"
    )(x)
    start = int(self.cls)
    if self.cls:
      cls = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
      x = jnp.concatenate([jnp.repeat(cls, len(x), 0).astype(x.dtype), x], 1)
    x = x + self.param(
      "positions", nn.initializers.normal(0.02), (1, *x.shape[1:])
    )
    if self.clip:
      x = nn.LayerNorm(epsilon=self.eps, name="pre_norm")(x)
    num_prompts = self.depth if self.hooks.deep else 1
    first, prompts = layers.prompts(self.hooks, x, num_prompts, self.depth, fan)
    if first is not None:
      x = jnp.concatenate([x[:, :start], first, x[:, start:]], 1)
    make = functools.partial(
      Block, self.num_heads, self.hidden, self.hooks, self.eps, start,
      self.attention, self.act,
    )  # fmt: skip
    names = [f"block{i}" for i in range(self.depth)]
    (rates,) = layers.drop_rates(self.drop_path, [self.depth])
    alone = self.pool == "token"  # is the class token read
    alike = self.depth - alone
    last = functools.partial(make, first=start)
    for block, few in ((make, slice(alike)), (last, slice(alike, None))):
      x = layers.repeat(
        self, block, names[few], x, prompts[few], rates[few],
        scan=self.scan, remat=self.remat,
      )  # fmt: skip
    if not self.fc_norm:
      x = nn.LayerNorm(epsilon=self.eps, name="norm")(x)
    x = x[:, 0] if alone else x[:, start:].mean(1)
    if self.fc_norm:
      x = nn.LayerNorm(epsilon=self.eps, name="fc_norm")(x)
    return x
