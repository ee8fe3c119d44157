"""Residual networks with batch normalisation.

`ResNet`: He et al. 2016, with the stride in the 3 x 3 convolution as in
torchvision; wide ones have a wider inside. Those that normalise before they
convolve are in `preact.py`.

Running statistics are in the collection `batch_stats`, a tree of their own.
"""

import functools

import jax
from flax import linen as nn

from roli_jax.models import layers
from roli_jax.models.conv import Conv
from roli_jax.models.hooks import Hooks
from roli_jax.types import Array, Float

Map = Float[Array, "b _ _ _"]


def batch_norm(x: Map, name: str, *, train: bool, eps: float) -> Map:
  """Batch normalisation as in PyTorch, in the precision of x.

  Args:
    x: the map.
    name: of the module.
    train: whether running statistics, which keep their own precision, move;
      they are then not used.
    eps: added to variances, > 0.
  """
  return nn.BatchNorm(
    use_running_average=not train,
    momentum=0.9,
    epsilon=eps,
    dtype=x.dtype,
    name=name,
  )(x)


class Block(nn.Module):
  """act(x + convolutions of x), each normalised.

  The convolutions are 3 x 3 and 3 x 3, or in a bottleneck 1 x 1, 3 x 3, 1 x 1.

  Attributes:
    width: channels after the block.
    inner: channels between the convolutions.
    bottleneck: which kind of block.
    norm: normalises, called as `norm(x, name=...)`.
    act: the activation.
    hooks: where a method may enter.
    group: channels of each group of a 3 x 3 convolution; 0: all are one.
    stride: the stride of the first 3 x 3 convolution.
  """

  width: int
  inner: int
  bottleneck: bool
  norm: functools.partial[Map]
  act: layers.Activation
  hooks: Hooks
  group: int
  stride: int

  @nn.compact
  def __call__(self, x: Map) -> Map:
    convs = [(self.inner, 3, self.stride), (self.width, 3, 1)]
    if self.bottleneck:
      convs = [(self.inner, 1, 1), convs[0], (self.width, 1, 1)]
    y = x
    for i, (width, size, stride) in enumerate(convs, 1):
      if i > 1:
        y = self.act(y)
      groups = width // self.group if self.group and size > 1 else 1
      conv = Conv(
        width, size, stride, groups, hooks=self.hooks, name=f"conv{i}"
      )
      y = conv(y)
      y = self.norm(y, f"norm{i}")
    if self.hooks.branch:
      y = self.hooks.branch(name="branch")(y)
    if x.shape != y.shape:
      x = Conv(self.width, 1, self.stride, name="shortcut")(x)
      x = self.norm(x, "shortcut_norm")
    return self.act(x + y)


class Stage(nn.Module):
  """Blocks, of which the first may change shape.

  Attributes:
    block: makes a block from its `stride` and `name`.
    depth: number of blocks, >= 1.
    stride: the stride of the first one.
    scan: see `layers.repeat`.
    remat: see `layers.repeat`.
  """

  block: functools.partial
  depth: int
  stride: int
  scan: bool
  remat: bool

  @nn.compact
  def __call__(self, x: Map) -> Map:
    first = functools.partial(self.block, stride=self.stride)
    x = layers.repeat(self, first, range(1), x, remat=self.remat)
    make = functools.partial(self.block, stride=1)
    others = range(1, self.depth)
    return layers.repeat(
      self, make, others, x, scan=self.scan, remat=self.remat
    )


class ResNet(nn.Module):
  """A ResNet whose feature is the mean of its last map.

  Attributes:
    depths: blocks of each stage.
    bottleneck: which kind of block, see `Block`.
    inner: the first stage's inner width; each next one's is twice as large.
    small: whether the stem is 3 x 3, without stride or pooling, for images of
      32 pixels a side or less.
    width: the number of channels of the stem.
    act: the activation. Some robust ones have GELU in ReLU's place.
    eps: what normalisations add to variances.
    group: see `Block`.
    widths: of a RegNet (Radosavovic et al. 2020) the channels of each stage,
      within and after its blocks; its stem is 3 x 3 and not pooled, and it and
      each stage have a stride of 2. Empty: as the others say.
    hooks: where a method may enter.
    scan: see `layers.repeat`.
    remat: see `layers.repeat`.
  """

  depths: tuple[int, ...]
  bottleneck: bool
  inner: int = 64
  small: bool = False
  width: int = 64
  act: layers.Activation = jax.nn.relu
  eps: float = 1e-5
  group: int = 0
  widths: tuple[int, ...] = ()
  hooks: Hooks = Hooks()
  scan: bool = False
  remat: bool = False

  @nn.compact
  def __call__(self, x: Map, *, train: bool = False) -> Float[Array, "b d"]:
    size, stride = (3, 1) if self.small else (3 if self.widths else 7, 2)
    norm = functools.partial(batch_norm, train=train, eps=self.eps)
    x = Conv(self.width, size, stride, name="stem")(x)
    x = self.act(norm(x, "stem_norm"))
    if not (self.small or self.widths):
      x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    wider = 4 if self.bottleneck else 1
    for i, depth in enumerate(self.depths):
      widths = (self.width * 2**i * wider, self.inner * 2**i)
      if self.widths:
        widths = (self.widths[i], self.widths[i])
      block = functools.partial(
        Block, *widths, self.bottleneck, norm, self.act, self.hooks, self.group
      )
      stride = 2 if i or self.widths else 1
      x = Stage(block, depth, stride, self.scan, self.remat, name=f"stage{i}")(
        x
      )
    return x.mean((1, 2))
