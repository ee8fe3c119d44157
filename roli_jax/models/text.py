"""CLIP's text transformer (Radford et al. 2021, section 2.4)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from roli_jax.models import heads, layers
from roli_jax.types import Array, Float, Int

_EPS = 1e-5  # of the normalisations


def quick_gelu(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
  """x sigmoid(1.702 x), in place of the GELU in OpenAI's own weights."""
  return x * jax.nn.sigmoid(1.702 * x)


# As configurations of open_clip tell them apart.
ACTS: dict[str, Callable[..., Any]] = {
  "gelu": layers.gelu,
  "quick_gelu": quick_gelu,
}


class Attention(nn.Module):
  """`layers.Attention` in which a token sees itself and those before it."""

  num_heads: int

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    b, n, width = x.shape
    q, k, v = (
      nn.Dense(width, name=name)(x).reshape(b, n, self.num_heads, -1)
      for name in ("q", "k", "v")
    )
    later = jnp.triu(jnp.full((1, 1, n, n), -jnp.inf), 1)
    mixed = layers.attention(q, k, v, later)
    return nn.Dense(width, name="out")(mixed.reshape(x.shape))


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  num_heads: int
  act: Callable[..., Any]

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    y = nn.LayerNorm(epsilon=_EPS, name="norm1")(x)
    x = x + Attention(self.num_heads, name="attn")(y)
    y = nn.LayerNorm(epsilon=_EPS, name="norm2")(x)
    return x + layers.Mlp(4 * x.shape[-1], act=self.act, name="mlp")(y)


class Text(nn.Module):
  """Texts as rows of ids to their embeddings, which have any length.

  The feature is the last block's token at the largest id, which is the end's.
  Rows may be shorter than the context, if their end is in them: no token sees
  what follows it.

  Among its leaves is `logit_scale`, which its pass does not use: of a CLIP's
  two towers there is one, and its file has it beside the text's.

  Attributes:
    vocab: number of ids.
    width: the width of a token.
    depth: number of blocks.
    num_heads: divides the width.
    context: most tokens of a text, start and end included.
    embed: width of an embedding.
    act: the GELU.
  """

  vocab: int
  width: int
  depth: int
  num_heads: int
  context: int
  embed: int
  act: Callable[..., Any] = layers.gelu

  @nn.compact
  def __call__(
    self, ids: Int[Array | np.ndarray, "b n"]
  ) -> Float[Array, "b embed"]:
    small = nn.initializers.normal(0.02)
    x = nn.Embed(self.vocab, self.width, embedding_init=small, name="embed")(
      ids
    )
    positions = self.param("positions", small, (1, self.context, self.width))
    x = x + positions[:, : ids.shape[1]]
    for i in range(self.depth):
      x = Block(self.num_heads, self.act, name=f"block{i}")(x)
    x = nn.LayerNorm(epsilon=_EPS, name="norm")(x)
    at_end = x[jnp.arange(len(x)), ids.argmax(-1)]
    scale = nn.initializers.constant(heads.LOGIT_SCALE)
    self.param("logit_scale", scale, ())
    return nn.Dense(self.embed, use_bias=False, name="projection")(at_end)
