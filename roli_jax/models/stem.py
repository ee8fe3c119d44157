"""Convolutions in place of patches, at the start of some transformers."""

import functools
from collections.abc import Callable

from flax import linen as nn

from roli_jax.models import layers
from roli_jax.models.conv import Conv
from roli_jax.types import Array, Float

# Width and stride of each convolution.
Convs = tuple[tuple[int, int], ...]


def layer_norm(
  x: Float[Array, "b h w c"], name: str, *, eps: float = 1e-6
) -> Float[Array, "b h w c"]:
  """Layer normalisation of each place's channels.

  Args:
    x: the map.
    name: of the module.
    eps: added to variances, > 0.
  """
  return nn.LayerNorm(epsilon=eps, name=name)(x)


class ConvStem(nn.Module):
  """3 x 3 convolutions, each normalised, with activations between them.

  Xiao et al. 2021. What comes after the last one is its user's.

  Attributes:
    convs: of each convolution.
    norm: normalises, called as `norm(x, name=...)`.
    use_bias: whether convolutions add a bias.
    act: the activation.
  """

  convs: Convs
  norm: Callable[..., Float[Array, "b h w c"]] = layer_norm
  use_bias: bool = True
  act: layers.Activation = layers.gelu

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
    conv = functools.partial(Conv, size=3, use_bias=self.use_bias)
    for i, (width, stride) in enumerate(self.convs):
      if i:
        x = self.act(x)
      x = conv(width, stride=stride, name=f"conv{i}")(x)
      x = self.norm(x, name=f"norm{i}")
    return x
