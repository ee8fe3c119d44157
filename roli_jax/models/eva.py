"""What EVA-02 has in a ViT's blocks (Fang et al. 2024).

Queries and keys that are turned by their place, and MLPs with gates.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from roli_jax.models import layers
from roli_jax.types import Array, Float

# The side of the map of patches that EVA-02 is pretrained on; places of another
# map are spread over it.
_SIDE = 16


def _angles(
  grid: tuple[int, int], channels: int
) -> Float[np.ndarray, "places half"]:
  """By how much each place turns each pair of channels: by row, by column."""
  bands = channels // 4
  speeds = 1e4 ** (-np.arange(bands) / bands)
  each = [_SIDE / side * np.arange(side)[:, None] * speeds for side in grid]
  shape = (*grid, bands)
  rows, columns = each[0][:, None], each[1][None]
  both = [np.broadcast_to(x, shape) for x in (rows, columns)]
  return np.concatenate(both, -1).reshape(-1, 2 * bands)


def turned_attention(
  attend: Callable[..., jax.Array],
  grid: tuple[int, int],
  q: Float[Array, "b m h c"],
  k: Float[Array, "b n h c"],
  v: Float[Array, "b n h c"],
) -> Float[Array, "b m h c"]:
  """Attention among tokens that are turned by their place (Su et al. 2021).

  Args:
    attend: mixes the values, as `layers.attention` does.
    grid: rows and columns of patches, which the last tokens are; those in front
      aren't turned.
    q: the queries of the first m tokens, by head; c is a multiple of 4.
    k: the keys of n tokens.
    v: the values of the same n tokens.
  """
  angles = _angles(grid, k.shape[-1])
  still = np.zeros((k.shape[1] - len(angles), angles.shape[1]))
  angles = np.concatenate([still, angles])[None, :, None]

  def turned(x: Float[Array, "b t h c"]) -> Float[Array, "b t h c"]:
    cos, sin = (
      jnp.asarray(wave(angles[:, : x.shape[1]]), x.dtype)
      for wave in (np.cos, np.sin)
    )
    a, b = x[..., ::2], x[..., 1::2]
    pairs = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1)
    return pairs.reshape(x.shape)

  return attend(turned(q), turned(k), v)


class GatedMlp(nn.Module):
  """Two layers; what is between them is multiplied by gates (Shazeer 2020).

  Attributes:
    hidden: the width between them.
    act: makes gates of numbers.
    eps: what a normalisation before the second adds to variances, > 0; None:
      there is none.
  """

  hidden: int
  act: layers.Activation
  eps: float | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    gate = self.act(nn.Dense(self.hidden, name="gate")(x))
    y = gate * nn.Dense(self.hidden, name="fc1")(x)
    if self.eps is not None:
      y = nn.LayerNorm(epsilon=self.eps, name="norm")(y)
    return nn.Dense(x.shape[-1], name="fc2")(y)
