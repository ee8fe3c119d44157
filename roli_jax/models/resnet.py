"""Residual networks with batch normalisation.

`ResNet`: He et al. 2016, with the stride in the 3 x 3 convolution as in
torchvision; wide ones have a wider inside. `WideResNet`: Zagoruyko & Komodakis
2016, pre-activation, for 32 x 32.

Running statistics are in the collection `batch_stats`, a tree of their own.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from roli_jax.models import layers
from roli_jax.models.conv import Conv
from roli_jax.models.hooks import Hooks
from roli_jax.types import Array, Float

Map = Float[Array, "b _ _ _"]
Activation = Callable[[Any], Any]


def _norm(x: Map, train: bool, name: str) -> Map:
  """Batch normalisation as in PyTorch, in the precision of what it is given.

  Running statistics keep their own. They move if `train`, and are not used.
  """
  norm = nn.BatchNorm(
    use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=x.dtype,
    name=name,
  )  # fmt: skip
  return norm(x)


class BasicBlock(nn.Module):
  """act(x + two 3 x 3 convolutions of x), each normalised."""

  width: int
  inner: int
  stride: int
  train: bool
  act: Activation
  hooks: Hooks

  @nn.compact
  def __call__(self, x: Map) -> Map:
    conv = functools.partial(Conv, hooks=self.hooks)
    y = conv(self.inner, 3, self.stride, name="conv1")(x)
    y = self.act(_norm(y, self.train, "norm1"))
    y = conv(self.width, 3, name="conv2")(y)
    y = _norm(y, self.train, "norm2")
    return _join(self, x, y)


class Bottleneck(nn.Module):
  """act(x + 1 x 1, 3 x 3, 1 x 1 convolutions of x), each normalised."""

  width: int
  inner: int
  stride: int
  train: bool
  act: Activation
  hooks: Hooks

  @nn.compact
  def __call__(self, x: Map) -> Map:
    conv = functools.partial(Conv, hooks=self.hooks)
    y = conv(self.inner, 1, name="conv1")(x)
    y = self.act(_norm(y, self.train, "norm1"))
    y = conv(self.inner, 3, self.stride, name="conv2")(y)
    y = self.act(_norm(y, self.train, "norm2"))
    y = conv(self.width, 1, name="conv3")(y)
    y = _norm(y, self.train, "norm3")
    return _join(self, x, y)


def _join(block, x, y):
  """act(x + y); x is projected where its shape is another."""
  if block.hooks.branch:
    y = block.hooks.branch(name="branch")(y)
  if x.shape != y.shape:
    x = Conv(block.width, 1, block.stride, name="shortcut")(x)
    x = _norm(x, block.train, "shortcut_norm")
  return block.act(x + y)


class Stage(nn.Module):
  """Blocks, of which the first may change shape.

  Attributes:
    block: makes a block.
    depth: number of blocks.
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
    names = [f"block{i}" for i in range(self.depth)]
    first = functools.partial(self.block, stride=self.stride)
    x = layers.repeat(self, first, names[:1], x, remat=self.remat)
    make = functools.partial(self.block, stride=1)
    return layers.repeat(
      self, make, names[1:], x, scan=self.scan, remat=self.remat
    )


class ResNet(nn.Module):
  """A ResNet whose feature is the mean of its last map.

  Attributes:
    depths: blocks of each stage.
    bottleneck: which kind of block.
    inner: the first stage's inner width; each next one's is twice as large.
    small: for images of 32 or less: a 3 x 3 stem without stride or pooling.
    width: the number of channels of the stem.
    act: the activation. Two robust models of ARES have GELU in ReLU's place.
    hooks: where a method may enter.
    scan: see `layers.repeat`.
    remat: see `layers.repeat`.
  """

  depths: tuple[int, ...]
  bottleneck: bool
  inner: int = 64
  small: bool = False
  width: int = 64
  act: Activation = jax.nn.relu
  hooks: Hooks = Hooks()
  scan: bool = False
  remat: bool = False

  @nn.compact
  def __call__(self, x: Map, *, train: bool = False) -> Float[Array, "b d"]:
    size, stride = (3, 1) if self.small else (7, 2)
    x = Conv(self.width, size, stride, name="stem")(x)
    x = self.act(_norm(x, train, "stem_norm"))
    if not self.small:
      x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    kind = Bottleneck if self.bottleneck else BasicBlock
    for i, depth in enumerate(self.depths):
      widths = {
        "width": self.width * 2**i * (4 if self.bottleneck else 1),
        "inner": self.inner * 2**i,
      }
      block = functools.partial(
        kind, train=train, act=self.act, hooks=self.hooks, **widths
      )
      x = Stage(
        block, depth, 2 if i else 1, self.scan, self.remat, name=f"stage{i}"
      )(x)
    return x.mean((1, 2))


class PreactBlock(nn.Module):
  """x + two convolutions, each after its normalisation."""

  width: int
  stride: int
  train: bool
  act: Activation
  same: bool
  hooks: Hooks

  @nn.compact
  def __call__(self, x: Map) -> Map:
    conv = functools.partial(Conv, hooks=self.hooks)
    y = self.act(_norm(x, self.train, "norm1"))
    if x.shape[-1] != self.width:
      shortcut = Conv(self.width, 1, self.stride, name="shortcut")
      x = shortcut(y)
    y = conv(self.width, 3, self.stride, same=self.same, name="conv1")(y)
    y = self.act(_norm(y, self.train, "norm2"))
    y = conv(self.width, 3, name="conv2")(y)
    if self.hooks.branch:
      y = self.hooks.branch(name="branch")(y)
    return x + y


class WideResNet(nn.Module):
  """A WRN-depth-factor; its feature is the mean of the last activations.

  Attributes:
    depth: 6 n + 4.
    factor: what the widths 16, 32 and 64 are multiplied by.
    act: the activation; SiLU in those of Gowal et al. 2020.
    same: how strides are padded, see `Conv`.
    hooks: where a method may enter.
    scan: see `layers.repeat`.
    remat: see `layers.repeat`.
  """

  depth: int
  factor: int
  act: Activation = jax.nn.relu
  same: bool = False
  hooks: Hooks = Hooks()
  scan: bool = False
  remat: bool = False

  @nn.compact
  def __call__(self, x: Map, *, train: bool = False) -> Float[Array, "b d"]:
    x = Conv(16, 3, name="stem")(x)
    for i in range(3):
      block = functools.partial(
        PreactBlock, 16 * 2**i * self.factor, train=train, act=self.act,
        same=self.same, hooks=self.hooks,
      )  # fmt: skip
      x = Stage(
        block, (self.depth - 4) // 6, 2 if i else 1, self.scan, self.remat,
        name=f"stage{i}",
      )(x)  # fmt: skip
    x = self.act(_norm(x, train, "norm"))
    return jnp.mean(x, (1, 2))
