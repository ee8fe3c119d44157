"""Vision transformer (Dosovitskiy et al. 2021)."""

from flax import linen as nn

from roli_jax.models import layers
from roli_jax.models.seams import Seams
from roli_jax.types import Array, Float


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  num_heads: int
  hidden: int
  seams: Seams

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    y = nn.LayerNorm(epsilon=1e-6, name="norm1")(x)
    x = x + layers.Attention(self.num_heads, self.seams, name="attn")(y)
    y = nn.LayerNorm(epsilon=1e-6, name="norm2")(x)
    y = layers.Mlp(self.hidden, name="mlp")(y)
    if self.seams.branch:
      y = self.seams.branch(name="branch")(y)
    return x + y


class Vit(nn.Module):
  """A ViT whose feature is the mean of its normalised patch tokens.

  Attributes:
    patch: side of a patch in pixels; divides the image's sides.
    width: of a token.
    depth: number of blocks.
    num_heads: divides the width.
    hidden: width inside the MLPs.
    seams: where a method may enter.
  """

  patch: int
  width: int
  depth: int
  num_heads: int
  hidden: int
  seams: Seams = Seams()

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], *, train: bool = False
  ) -> Float[Array, "b d"]:
    del train  # no dropout, no running statistics
    x = layers.PatchEmbed(self.patch, self.width, name="embed")(x)
    x = x + self.param(
      "positions", nn.initializers.normal(0.02), (1, *x.shape[1:])
    )
    for i in range(self.depth):
      if self.seams.tokens:
        x = self.seams.tokens(name=f"tokens{i}")(x)
      x = Block(self.num_heads, self.hidden, self.seams, name=f"block{i}")(x)
    return nn.LayerNorm(epsilon=1e-6, name="norm")(x).mean(1)
