"""XCiT (El-Nouby et al. 2021): attention among channels, not tokens.

As timm computes it where `tokens_norm` is set.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from roli_jax.models import layers
from roli_jax.models.conv import Conv
from roli_jax.models.hooks import Hooks
from roli_jax.models.resnet import batch_norm
from roli_jax.models.stem import ConvStem
from roli_jax.types import Array, Float

_WAVES = 32  # of a place, along each side
_CLASS_BLOCKS = 2


def _fourier(rows: int, columns: int) -> Float[np.ndarray, "h w waves"]:
  """Sines and cosines of each place's row, then those of its column."""
  lengths = 1e4 ** (2 * (np.arange(_WAVES) // 2) / _WAVES)

  def waves(count: int) -> np.ndarray:
    turn = 2 * np.pi * np.arange(1, count + 1) / (count + 1e-6)
    angles = turn[:, None] / lengths
    return np.where(np.arange(_WAVES) % 2, np.cos(angles), np.sin(angles))

  shape = (rows, columns, _WAVES)
  each = waves(rows)[:, None], waves(columns)[None]
  return np.concatenate([np.broadcast_to(x, shape) for x in each], -1)


def _unit(x: Float[Array, "... n"]) -> Float[Array, "... n"]:
  """Vectors of length 1, but for those that are nearly zero."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  squares = jnp.square(x.astype(wide)).sum(-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(squares, 1e-24)).astype(x.dtype)


class ChannelAttention(nn.Module):
  """Attention of a head's channels to one another; El-Nouby et al., Eq. 2.

  Attributes:
    num_heads: divides the width.
    hooks: where a method may enter.
  """

  num_heads: int
  hooks: Hooks

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    b, h, w, d = x.shape
    # A channel is a row of what it is at each place.
    q, k, v = (
      self.hooks.dense(d, name=name)(x)
      .reshape(b, h * w, self.num_heads, -1)
      .swapaxes(1, 3)
      for name in ("q", "k", "v")
    )
    temperature = self.param(
      "temperature", nn.initializers.ones, (self.num_heads, 1, 1)
    )
    # `attention` divides by the root of a row's length.
    by_head = temperature.reshape(1, 1, -1, 1) * (h * w) ** 0.5
    mixed = layers.attention(_unit(q) * by_head, _unit(k), v)
    return nn.Dense(d, name="out")(mixed.swapaxes(1, 3).reshape(x.shape))


class Local(nn.Module):
  """Two depthwise 3 x 3 convolutions, which places speak to neighbours by.

  Attributes:
    act: the activation between them.
    norm: normalises, called as `norm(x, name=...)`.
  """

  act: layers.Activation
  norm: functools.partial[Float[Array, "b h w d"]]

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    d = x.shape[-1]
    conv = functools.partial(Conv, d, 3, groups=d, use_bias=True)
    x = self.norm(self.act(conv(name="conv1")(x)), name="norm")
    return conv(name="conv2")(x)


class Block(nn.Module):
  """x + attention, + convolutions, + an MLP, each of x normalised and scaled.

  Attributes:
    num_heads: divides the width.
    act: the activation.
    eps: what layer normalisations add to variances, > 0.
    norm: of batches, called as `norm(x, name=...)`.
    hooks: where a method may enter.
  """

  num_heads: int
  act: layers.Activation
  eps: float
  norm: functools.partial[Float[Array, "b h w d"]]
  hooks: Hooks

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w d"], rate: layers.Rate
  ) -> Float[Array, "b h w d"]:
    """The map after the block; `rate` is that of `layers.drop_path`."""
    width = x.shape[-1]
    mlp = layers.Mlp(4 * width, act=self.act, name="mlp")
    # Their numbers are timm's, whose order is another.
    for i, branch in (
      (1, ChannelAttention(self.num_heads, self.hooks, name="attn")),
      (3, Local(self.act, self.norm, name="local")),
      (2, mlp),
    ):
      y = branch(nn.LayerNorm(epsilon=self.eps, name=f"norm{i}")(x))
      if branch is mlp and self.hooks.branch:
        y = self.hooks.branch(name="branch")(y)
      y = layers.scaled(self, f"gamma{i}", y, 1)
      x = x + layers.drop_path(self, y, rate)
    return x


class ClassBlock(nn.Module):
  """The class token reads all tokens, then an MLP; Touvron et al. 2021.

  Other tokens are normalised, and added to themselves, as they were trained.

  Attributes:
    num_heads: divides the width.
    act: the activation.
    eps: what the normalisations add to variances, > 0.
    hooks: where a method may enter.
  """

  num_heads: int
  act: layers.Activation
  eps: float
  hooks: Hooks

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    y = nn.LayerNorm(epsilon=self.eps, name="norm1")(x)
    attention = layers.Attention(
      self.num_heads, layers.attention, self.hooks, 1, name="attn"
    )
    y = jnp.concatenate([attention(y), y[:, 1:]], 1)
    x = x + layers.scaled(self, "gamma1", y, 1)
    x = nn.LayerNorm(epsilon=self.eps, name="norm2")(x)
    y = layers.Mlp(4 * x.shape[-1], act=self.act, name="mlp")(x[:, :1])
    if self.hooks.branch:
      y = self.hooks.branch(name="branch")(y)
    y = layers.scaled(self, "gamma2", y, 1)
    return x + jnp.concatenate([y, x[:, 1:]], 1)


class Xcit(nn.Module):
  """An XCiT whose feature is its class token.

  Attributes:
    width: channels of a place.
    depth: number of blocks before the two that the class token is in.
    num_heads: divides the width.
    patch: the stride of the four convolutions that make the map, 1 to 16: the
      first ones have stride 1 where it is less than 16. No array shows it.
    eps: what layer normalisations add to variances, > 0.
    act: the activation.
    hooks: where a method may enter.
    drop_path: the last block's rate of `layers.drop_path`, in training.
    scan: see `layers.repeat`.
    remat: see `layers.repeat`.
  """

  width: int
  depth: int
  num_heads: int
  patch: int = 16
  eps: float = 1e-6
  act: layers.Activation = layers.gelu
  hooks: Hooks = Hooks()
  drop_path: float = 0.0
  scan: bool = False
  remat: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], *, train: bool = False
  ) -> Float[Array, "b d"]:
    norm = functools.partial(batch_norm, train=train, eps=1e-5)
    convs = tuple(
      (self.width // 2 ** (3 - i), 1 + (self.patch >= 2 ** (4 - i)))
      for i in range(4)
    )
    x = ConvStem(convs, norm, False, self.act, name="embed")(x)
    places = jnp.asarray(_fourier(*x.shape[1:3])[None], x.dtype)
    x = x + Conv(self.width, 1, use_bias=True, name="fourier")(places)
    make = functools.partial(
      Block, self.num_heads, self.act, self.eps, norm, self.hooks
    )
    (rates,) = layers.drop_rates(self.drop_path, [self.depth])
    blocks = range(self.depth)
    x = layers.repeat(
      self, make, blocks, x, rates, scan=self.scan, remat=self.remat
    )
    x = x.reshape(len(x), -1, self.width)
    cls = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
    x = jnp.concatenate([jnp.repeat(cls, len(x), 0).astype(x.dtype), x], 1)
    for i in range(_CLASS_BLOCKS):
      x = ClassBlock(
        self.num_heads, self.act, self.eps, self.hooks, name=f"class{i}"
      )(x)
    return nn.LayerNorm(epsilon=self.eps, name="norm")(x[:, 0])
