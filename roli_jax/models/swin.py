"""Swin transformer (Liu et al. 2021): attention in windows that shift."""

import functools
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from roli_jax.models import layers
from roli_jax.models.hooks import Hooks
from roli_jax.types import Array, Float, Int

# A number of tokens; an array where blocks are one loop.
Shift = int | Int[Array, ""]

# Of tokens, or of the numbers of regions.
Values = TypeVar("Values", jax.Array, np.ndarray)


def _offsets(window: int) -> Int[np.ndarray, "places places"]:
  """For each pair of a window's places, its row in the table of biases."""
  places = np.indices((window, window)).reshape(2, -1)
  dy, dx = places[:, :, None] - places[:, None] + window - 1
  return dy * (2 * window - 1) + dx


def _mask(
  side: int, window: int, shift: int
) -> Float[np.ndarray, "windows places places"]:
  """-100 between places that only the roll has brought into one window, else 0.

  Not -inf, since Swin was trained with -100.
  """
  edges = (0, side - window, side - shift, side)
  region = np.repeat(np.arange(3), np.diff(edges))
  regions = _windows(3 * region[None, :, None, None] + region[:, None], window)
  regions = regions[0, :, :, 0]
  same = regions[:, :, None] == regions[:, None]
  return np.where(same, 0, -100).astype(np.float32)


def _windows(x: Values, window: int) -> Values:
  """The windows of a map, [b, h, w, c] -> [b, windows, places, c]."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // window, window, w // window, window, c)
  return x.swapaxes(2, 3).reshape(b, -1, window * window, c)


def _whole(
  x: Float[Array, "b windows places c"], side: int
) -> Float[Array, "b side side c"]:
  """Undoes `_windows`."""
  b, _, places, c = x.shape
  window = round(places**0.5)
  x = x.reshape(b, side // window, side // window, window, window, c)
  return x.swapaxes(2, 3).reshape(b, side, side, c)


def _rolled(
  x: Float[Array, "b side side c"], shift: Shift
) -> Float[Array, "b side side c"]:
  """The map moved by so many tokens down and to the right, around the edges."""
  both: Any = (shift, shift)  # roll's stubs know no arrays in a tuple
  return jnp.roll(x, both, (1, 2))


class WindowAttention(nn.Module):
  """Attention within each window, with a bias by relative position.

  Attributes:
    num_heads: divides the width.
    window: the side of a window, in tokens.
    hooks: where a method may enter.
    attention: which of `Swin.attentions`.
    width: of the tokens after it; None: that before it.
  """

  num_heads: int
  window: int
  hooks: Hooks
  attention: str
  width: int | None = None

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b w n d"],
    mask: Float[Array, "w places places"] | None,
  ) -> Float[Array, "b w n e"]:
    """Mixes the tokens of each window.

    Args:
      x: tokens by window: any prompts, then the places of the window's map.
      mask: added to the scores between places.
    """
    heads = (*x.shape[:3], self.num_heads, -1)
    q, k, v = (
      self.hooks.dense(x.shape[-1], name=name)(x).reshape(heads)
      for name in ("q", "k", "v")
    )
    table = self.param(
      "relative_bias",
      nn.initializers.truncated_normal(0.02),
      ((2 * self.window - 1) ** 2, self.num_heads),
    )
    bias = table[_offsets(self.window)].transpose(2, 0, 1)[None]
    if mask is not None:
      bias = bias + mask[:, None].astype(bias.dtype)
    before = x.shape[2] - self.window**2
    bias = jnp.pad(bias, ((0, 0), (0, 0), (before, 0), (before, 0)))
    mixed = layers.ATTENTIONS[self.attention](q, k, v, bias[None])
    width = self.width or x.shape[-1]
    return nn.Dense(width, name="out")(mixed.reshape(x.shape))


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); prompts first.

  Attributes:
    num_heads: the number of heads of the attention, divides the width.
    window: the side of a window, in tokens.
    side: the side of the map, in tokens.
    eps: what the normalisations add to variances, > 0.
    sparse: see `Swin`.
    hooks: where a method may enter.
    attention: which of `Swin.attentions`.
  """

  num_heads: int
  window: int
  side: int
  eps: float
  sparse: bool
  hooks: Hooks
  attention: str

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    shift: Shift,
    prompts: layers.Prompts,
    rate: layers.Rate,
  ) -> Float[Array, "b n d"]:
    """The tokens after the block.

    Args:
      x: prompts, if any, then the map's tokens.
      shift: how far the windows are shifted, in tokens.
      prompts: what a method puts in place of those in x.
      rate: the rate of `layers.drop_path`, in [0, 1).
    """
    before = x.shape[1] - self.side**2
    if prompts is not None:
      x = jnp.concatenate([prompts, x[:, before:]], 1)
    y = nn.LayerNorm(epsilon=self.eps, name="norm1")(x)
    y = self._attend(y[:, :before], y[:, before:], shift)
    x = self._sparse(x + layers.drop_path(self, y, rate), "sparse1")
    y = nn.LayerNorm(epsilon=self.eps, name="norm2")(x)
    y = layers.Mlp(4 * x.shape[-1], sparse=self.sparse, name="mlp")(y)
    y = self._sparse(y, "sparse_mlp")
    y = layers.drop_path(self, y, rate)
    if self.hooks.branch:
      y = self.hooks.branch(name="branch")(y)
    return self._sparse(x + y, "sparse2")

  def _sparse(
    self, x: Float[Array, "b n d"], name: str
  ) -> Float[Array, "b n d"]:
    return layers.MeanSparse(name=name)(x) if self.sparse else x

  def _attend(
    self,
    prompts: Float[Array, "b p d"],
    x: Float[Array, "b n d"],
    shift: Shift,
  ) -> Float[Array, "b m d"]:
    """Attention within shifted windows, with all prompts in each of them."""
    b, _, d = x.shape
    # In a loop over blocks a shift is known only when it runs.
    shifts = not isinstance(shift, int) or shift > 0
    x = x.reshape(b, self.side, self.side, d)
    mask: jax.Array | None = None
    if shifts:
      x = _rolled(x, -shift)
      mixed_up = _mask(self.side, self.window, self.window // 2)
      mask = jnp.where(shift > 0, mixed_up, 0)
    x = _windows(x, self.window)
    num_windows = x.shape[1]
    in_front = jnp.repeat(prompts[:, None], num_windows, 1)
    if self.hooks.mixed:
      in_front = jnp.tile(prompts, (num_windows, 1, 1)).reshape(in_front.shape)
    attention = WindowAttention(
      self.num_heads, self.window, self.hooks, self.attention, name="attn"
    )
    y = attention(jnp.concatenate([in_front, x], 2), mask)
    num_prompts = prompts.shape[1]
    x = _whole(y[:, :, num_prompts:], self.side)
    if shifts:
      x = _rolled(x, shift)
    x = x.reshape(b, -1, d)
    if not num_prompts:
      return x
    in_front = y[:, :, :num_prompts]
    if self.hooks.mixed:
      shape = (num_windows, b, num_prompts, d)
      in_front = in_front.reshape(shape).swapaxes(0, 1)
    return jnp.concatenate([in_front.mean(1), x], 1)


class Merge(nn.Module):
  """Each 2 x 2 tokens become one of twice the width; prompts four of it.

  Attributes:
    side: the side of the map before, in tokens, even.
    eps: what the normalisation adds to variances, > 0.
  """

  side: int
  eps: float

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b m e"]:
    b, n, d = x.shape
    half = self.side // 2
    before = n - self.side**2
    prompts, x = jnp.tile(x[:, :before], (1, 1, 4)), x[:, before:]
    # Column before row, the order that the weights were trained in.
    x = x.reshape(b, half, 2, half, 2, d).transpose(0, 1, 3, 4, 2, 5)
    x = jnp.concatenate([prompts, x.reshape(b, half * half, 4 * d)], 1)
    x = nn.LayerNorm(epsilon=self.eps, name="norm")(x)
    return nn.Dense(2 * d, use_bias=False, name="reduction")(x)


class Stage(nn.Module):
  """A merge, but for the first stage, then blocks; every other one shifts.

  Attributes:
    num_heads: the number of heads of each block's attention.
    side: the side of the map after the merge, in tokens.
    first: whether this is the first stage, which merges nothing.
    rates: a rate for each block, see `layers.drop_path`.
    window: the side of a window, in tokens.
    fan: see `Hooks.tokens`.
    eps: what the normalisations add to variances, > 0.
    sparse: see `Swin`.
    hooks: where a method may enter.
    attention: which of `attentions`.
    scan: see `layers.repeat`.
    remat: see `layers.repeat`.
  """

  num_heads: int
  side: int
  first: bool
  rates: tuple[float, ...]
  window: int
  fan: int
  eps: float
  sparse: bool
  hooks: Hooks
  attention: str
  scan: bool
  remat: bool

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b m e"]:
    depth = len(self.rates)
    num_prompted = depth if self.hooks.deep else int(self.first)
    if not self.first:
      side = 2 * self.side
      if num_prompted:  # the prompts of the stage before end here
        x = x[:, -(side**2) :]
      x = Merge(side, self.eps, name="merge")(x)
    added, prompts = layers.prompts(
      self.hooks, x, num_prompted, depth, self.fan
    )
    if added is not None:
      x = jnp.concatenate([added, x], 1)
    # Every other block shifts. With a single window there is nowhere to go.
    shift = self.window // 2 if self.side > self.window else 0
    shifts = [i % 2 * shift for i in range(depth)]
    make = functools.partial(
      Block,
      self.num_heads,
      self.window,
      self.side,
      self.eps,
      self.sparse,
      self.hooks,
      self.attention,
    )
    blocks, each = range(depth), (shifts, prompts, self.rates)
    return layers.repeat(
      self, make, blocks, x, *each, scan=self.scan, remat=self.remat
    )


class Swin(nn.Module):
  """A Swin whose feature is the mean of its normalised last tokens.

  Attributes:
    width: channels of the first stage; each next one's is twice as large.
    depths: blocks of each stage.
    num_heads: the number of heads in each stage.
    patch: side of a patch in pixels.
    window: the side of a window in tokens; a smaller map is one window. None:
      the side of the last stage's map, which is the image's divided by all
      strides: 7 at 224.
    eps: what the normalisations add to variances, > 0.
    sparse: whether `layers.MeanSparse` stands before each activation, and after
      each MLP and each sum.
    drop_path: the last block's rate of `layers.drop_path`, in training.
    hooks: where a method may enter.
    attention: which of `attentions`.
    scan: see `layers.repeat`.
    remat: see `layers.repeat`.
  """

  width: int
  depths: tuple[int, ...]
  num_heads: tuple[int, ...]
  patch: int = 4
  window: int | None = None
  eps: float = 1e-5
  sparse: bool = False
  drop_path: float = 0.0
  hooks: Hooks = Hooks()
  attention: str = "plain"
  scan: bool = False
  remat: bool = False
  # Those of `layers.ATTENTIONS` that take a bias.
  attentions: ClassVar[tuple[str, ...]] = ("plain", "looped")

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], *, train: bool = False
  ) -> Float[Array, "b d"]:
    del train  # no running statistics
    sides = self._sides(x)
    fan = self.patch**2 * x.shape[-1] + self.width
    x = layers.PatchEmbed(self.patch, self.width, name="embed")(x)
    x = nn.LayerNorm(epsilon=self.eps, name="embed_norm")(x)
    shared = (
      fan,
      self.eps,
      self.sparse,
      self.hooks,
      self.attention,
      self.scan,
      self.remat,
    )
    rates = layers.drop_rates(self.drop_path, self.depths)
    stages = enumerate(zip(self.num_heads, sides, rates, strict=True))
    for i, (num_heads, side, block_rates) in stages:
      window = min(self.window or sides[-1], side)
      x = Stage(
        num_heads, side, i == 0, block_rates, window, *shared, name=f"stage{i}"
      )(x)
    return nn.LayerNorm(epsilon=self.eps, name="norm")(x).mean(1)

  def _sides(self, x: Float[Array, "b h w c"]) -> list[int]:
    """The side of each stage's map, in tokens.

    Raises:
      ValueError: the images can't be cut into patches and windows.
    """
    strides = [self.patch * 2**i for i in range(len(self.depths))]
    if x.shape[1] != x.shape[2] or x.shape[1] % strides[-1]:
      raise ValueError(
        f"a Swin takes square images whose side is a multiple of {strides[-1]},"
        f" got {x.shape[1]} x {x.shape[2]}"
      )
    sides = [x.shape[1] // stride for stride in strides]
    if self.window and any(side % min(self.window, side) for side in sides):
      raise ValueError(
        f"windows of {self.window} do not tile maps whose sides are {sides}"
      )
    return sides
