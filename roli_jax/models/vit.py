"""Vision transformer (Dosovitskiy et al. 2021)."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from roli_jax.models import eva, layers
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
    scaled: whether each branch is multiplied by a factor of each channel.
    key_bias: whether keys have a bias.
    mlp: makes the MLP, called as `layers.Mlp` is.
  """

  num_heads: int
  hidden: int
  act: layers.Activation
  eps: float
  attend: Callable[..., jax.Array]
  hooks: Hooks = Hooks()
  start: int = 0
  first: int | None = None
  scaled: bool = False
  key_bias: bool = True
  mlp: Callable[..., nn.Module] = layers.Mlp

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
      self.num_heads, self.attend, self.hooks, self.first, self.key_bias,
      name="attn",
    )  # fmt: skip
    y = self._scaled("gamma1", attention(y))
    x = x[:, : self.first] + layers.drop_path(self, y, rate)
    y = nn.LayerNorm(epsilon=self.eps, name="norm2")(x)
    y = self.mlp(self.hidden, act=self.act, name="mlp")(y)
    y = layers.drop_path(self, y, rate)
    if self.hooks.branch:
      y = self.hooks.branch(name="branch")(y)
    return x + self._scaled("gamma2", y)

  def _scaled(self, name: str, y: jax.Array) -> jax.Array:
    return layers.scaled(self, name, y, 1e-6) if self.scaled else y


class Vit(nn.Module):
  """A ViT; its feature is the class token, or the mean of the patches.

  Attributes:
    patch: side of a patch in pixels; divides the image's sides.
    width: the width of a token.
    depth: number of blocks.
    num_heads: divides the width.
    hidden: the width inside the MLPs.
    pool: `token`: the class token is the feature; `mean`: the mean of the
      patches' tokens.
    cls: whether there is a class token.
    distilled: whether a second one follows it, which has learnt of a teacher
      (Touvron et al. 2021); the feature is both, one after the other.
    registers: the number of tokens after these that only blocks read (Darcet et
      al. 2024).
    cls_positions: whether all of these have positions; otherwise patches alone.
    scaled: whether each branch is multiplied by a factor of each channel, as in
      DeiT-III (Touvron et al. 2022).
    fc_norm: whether the feature is normalised, and not the tokens before it.
    clip: whether patches have no bias, and a normalisation stands before the
      blocks, as in CLIP.
    eva: whether queries and keys are turned by their place, keys have no bias,
      and MLPs have gates, as in EVA-02: see `eva`.
    gate_norm: whether these MLPs normalise what they have gated.
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
  distilled: bool = False
  registers: int = 0
  cls_positions: bool = True
  scaled: bool = False
  fc_norm: bool = False
  clip: bool = False
  eva: bool = False
  gate_norm: bool = False
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
    options = self._options(x)
    x = self._embedded(x)
    if self.cls_positions:
      x = self._placed(self._led(x))
    else:
      x = self._led(self._placed(x))
    start = self.cls + self.distilled + self.registers
    if self.clip:
      x = nn.LayerNorm(epsilon=self.eps, name="pre_norm")(x)
    num_prompted = self.depth if self.hooks.deep else 1
    added, prompts = layers.prompts(
      self.hooks, x, num_prompted, self.depth, fan
    )
    if added is not None:
      x = jnp.concatenate([x[:, :start], added, x[:, start:]], 1)
    make = functools.partial(
      Block, self.num_heads, self.hidden, self.act, self.eps, hooks=self.hooks,
      start=start, scaled=self.scaled, **options,
    )  # fmt: skip
    (rates,) = layers.drop_rates(self.drop_path, [self.depth])
    alone = self.pool == "token"  # whether only class tokens are read
    whole = self.depth - alone  # blocks that compute all tokens
    read = 1 + self.distilled
    for first, part in ((None, slice(whole)), (read, slice(whole, None))):
      block = functools.partial(make, first=first)
      numbers, each = range(self.depth)[part], (prompts[part], rates[part])
      x = layers.repeat(
        self, block, numbers, x, *each, scan=self.scan, remat=self.remat
      )
    if not self.fc_norm:
      x = nn.LayerNorm(epsilon=self.eps, name="norm")(x)
    x = x[:, :read].reshape(len(x), -1) if alone else x[:, start:].mean(1)
    if self.fc_norm:
      x = nn.LayerNorm(epsilon=self.eps, name="fc_norm")(x)
    return x

  def _options(self, x: Float[Array, "b h w c"]) -> dict[str, Any]:
    """How the blocks attend, and what their MLPs are, for such images."""
    attend = layers.ATTENTIONS[self.attention]
    if not self.eva:
      return {"attend": attend}
    rows, columns = (side // self.patch for side in x.shape[1:3])
    return {
      "attend": functools.partial(
        eva.turned_attention, attend, (rows, columns)
      ),
      "key_bias": False,
      "mlp": functools.partial(
        eva.GatedMlp, eps=self.eps if self.gate_norm else None
      ),
    }

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

  def _led(self, x: Float[Array, "b n d"]) -> Float[Array, "b m d"]:
    """The tokens behind those that are no patches."""
    numbers = {
      "cls": self.cls, "dist": self.distilled, "registers": self.registers,
    }  # fmt: skip
    tokens = [
      self.param(name, nn.initializers.zeros, (1, number, self.width))
      for name, number in numbers.items()
      if number
    ]
    each = [jnp.repeat(token, len(x), 0).astype(x.dtype) for token in tokens]
    return jnp.concatenate([*each, x], 1)

  def _placed(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """The tokens, each with its position."""
    start = nn.initializers.normal(0.02)
    return x + self.param("positions", start, (1, *x.shape[1:]))
