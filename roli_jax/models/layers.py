"""What two backbones share."""

import jax
from flax import linen as nn

from roli_jax.models.seams import Seams
from roli_jax.types import Array, Float


class Attention(nn.Module):
  """Multi-head self-attention with q, k, v as three projections.

  Attributes:
    num_heads: divides the width.
    seams: where a method may enter.
  """

  num_heads: int
  seams: Seams = Seams()

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    heads = (*x.shape[:2], self.num_heads, -1)
    q, k, v = (
      self.seams.dense(x.shape[-1], name=name)(x).reshape(heads)
      for name in ("q", "k", "v")
    )
    mixed = jax.nn.dot_product_attention(q, k, v)
    return nn.Dense(x.shape[-1], name="out")(mixed.reshape(x.shape))


class Mlp(nn.Module):
  """Two layers with an exact GELU between them."""

  hidden: int

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    hidden = nn.gelu(nn.Dense(self.hidden, name="fc1")(x), approximate=False)
    return nn.Dense(x.shape[-1], name="fc2")(hidden)


class PatchEmbed(nn.Module):
  """A convolution whose stride is its size, as one matrix product.

  The kernel has the shape of the convolution's, [patch, patch, c, width]. On a
  CPU a product inside a loop is several times faster than a convolution.
  """

  patch: int
  width: int

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
    b, h, w, c = x.shape
    p = self.patch
    if h % p or w % p:
      raise ValueError(f"patches of {p} do not tile images of {h} x {w}")
    kernel = self.param(
      "kernel", nn.initializers.lecun_normal(), (p, p, c, self.width)
    )
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    x = x.reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3)
    x = x.reshape(b, (h // p) * (w // p), p * p * c)
    return x @ kernel.reshape(-1, self.width) + bias.reshape(1, 1, -1)
