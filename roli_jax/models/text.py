"""CLIP's text transformer (Radford et al. 2021, section 2.4)."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from roli_jax.models import heads, layers, vit
from roli_jax.types import Array, Float, Int

_EPS = 1e-5  # added to the normalisations' variances


# By the names that open_clip's configurations give them.
ACTS = {name: layers.ACTS[name] for name in ("gelu", "quick_gelu")}


class Text(nn.Module):
  """Embeds texts, given as rows of ids; embeddings have any length.

  The feature is the last block's token at the largest id, which is the end's.
  Rows may be shorter than the context, if their end is in them: no token sees
  what follows it.

  Among the parameters is `logit_scale`, which the pass does not use: a CLIP's
  two towers share it, and its file keeps it beside the text's.

  Attributes:
    vocab: number of ids.
    width: the width of a token.
    depth: number of blocks.
    num_heads: divides the width.
    context: most tokens of a text, start and end included.
    embed: the width of an embedding.
    act: the GELU.
  """

  vocab: int
  width: int
  depth: int
  num_heads: int
  context: int
  embed: int
  act: layers.Activation = layers.gelu

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
    sizes = (self.num_heads, 4 * self.width, self.act, _EPS)
    for i in range(self.depth):
      x = vit.Block(*sizes, layers.causal_attention, name=f"block{i}")(x)
    x = nn.LayerNorm(epsilon=_EPS, name="norm")(x)
    at_end = x[jnp.arange(len(x)), ids.argmax(-1)]
    scale = nn.initializers.constant(heads.LOGIT_SCALE)
    self.param("logit_scale", scale, ())
    return nn.Dense(self.embed, use_bias=False, name="projection")(at_end)
