"""Networks of inverted residuals: narrow between blocks, wide and cheap within.

EfficientNet (Tan & Le 2019), its Lite without gates, and MobileNetV3 (Howard et
al. 2019).
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
from flax import linen as nn

from roli_jax.models import layers
from roli_jax.models.conv import Conv
from roli_jax.models.hooks import Hooks
from roli_jax.models.preact import Excite
from roli_jax.models.resnet import Map, batch_norm
from roli_jax.types import Array, Float


class Inverted(NamedTuple):
  """The sizes of a block.

  Attributes:
    size: side of the depthwise kernel, odd.
    stride: of the depthwise convolution.
    hidden: channels within the block.
    width: channels after it.
    squeezed: units of its gate, see `preact.Excite`; 0: it has none.
  """

  size: int
  stride: int
  hidden: int
  width: int
  squeezed: int = 0


def stage(
  size: int,
  stride: int,
  width: int,
  hidden: Sequence[int],
  squeezed: Sequence[int] = (),
) -> tuple[Inverted, ...]:
  """Returns the blocks of a stage, of which the first has the stride.

  Args:
    size: see `Inverted`; likewise `stride` and `width`.
    stride: see there.
    width: see there.
    hidden: channels within each block.
    squeezed: units of each block's gate; empty: no gates.
  """
  units = squeezed or [0] * len(hidden)
  return tuple(
    Inverted(size, 1 if i else stride, inside, width, unit)
    for i, (inside, unit) in enumerate(zip(hidden, units, strict=True))
  )


class Block(nn.Module):
  """Widens, convolves each channel by itself, gates, narrows; x is added.

  It is added where the map keeps its shape; a block that is not to widen does
  not.

  Attributes:
    sizes: its sizes.
    norm: normalises, called as `norm(x, name=...)`.
    act: the activation of the wide.
    excite: makes the gate from its number of units.
    same: how strides are padded, see `Conv`.
    hooks: where a method may enter.
  """

  sizes: Inverted
  norm: functools.partial[Map]
  act: layers.Activation
  excite: functools.partial[Excite]
  same: bool
  hooks: Hooks

  @nn.compact
  def __call__(self, x: Map) -> Map:
    size, stride, hidden, width, squeezed = self.sizes
    y = x
    if hidden != x.shape[-1]:
      y = Conv(hidden, 1, hooks=self.hooks, name="expand")(y)
      y = self.act(self.norm(y, "expand_norm"))
    y = Conv(hidden, size, stride, hidden, same=self.same, name="depthwise")(y)
    y = self.act(self.norm(y, "depthwise_norm"))
    if squeezed:
      y = self.excite(squeezed, name="excite")(y)
    y = Conv(width, 1, hooks=self.hooks, name="project")(y)
    y = self.norm(y, "project_norm")
    if self.hooks.branch:
      y = self.hooks.branch(name="branch")(y)
    return x + y if x.shape == y.shape else y


class Stage(nn.Module):
  """Blocks, of which the alike may be one loop.

  Attributes:
    blocks: their sizes.
    make: makes one from its sizes and `name`.
    scan: see `layers.repeat`.
    remat: see `layers.repeat`.
  """

  blocks: tuple[Inverted, ...]
  make: functools.partial[Block]
  scan: bool
  remat: bool

  @nn.compact
  def __call__(self, x: Map) -> Map:
    start = 0
    # What comes to a stage's first block has another width: it is its own.
    alike = [
      (k, len([*same])) for k, same in itertools.groupby(self.blocks[1:])
    ]
    for sizes, number in [(self.blocks[0], 1), *alike]:
      numbers = range(start, start + number)
      make = functools.partial(self.make, sizes)
      x = layers.repeat(
        self, make, numbers, x, scan=self.scan, remat=self.remat
      )
      start = numbers.stop
    return x


class MobileNet(nn.Module):
  """A network of inverted residuals; its feature is a mean over the map.

  Attributes:
    stages: the blocks of each stage.
    width: channels of the stem.
    last: channels of the convolution after the stages.
    wide: units of a layer between the mean and the feature; 0: there is none.
    act: the activation.
    early: the number of stages that have ReLU in its place.
    squeeze_act: the activation within gates.
    gate: what makes gates of numbers.
    eps: what normalisations add to variances.
    same: how strides are padded, see `Conv`.
    hooks: where a method may enter; kernels are those of 1 x 1.
    scan: see `layers.repeat`.
    remat: see `layers.repeat`.
  """

  stages: tuple[tuple[Inverted, ...], ...]
  width: int
  last: int
  wide: int = 0
  act: layers.Activation = jax.nn.silu
  early: int = 0
  squeeze_act: layers.Activation = jax.nn.relu
  gate: layers.Activation = jax.nn.sigmoid
  eps: float = 1e-5
  same: bool = False
  hooks: Hooks = Hooks()
  scan: bool = False
  remat: bool = False

  @property
  def depths(self) -> tuple[int, ...]:
    """Blocks of each stage."""
    return tuple(len(blocks) for blocks in self.stages)

  @nn.compact
  def __call__(self, x: Map, *, train: bool = False) -> Float[Array, "b d"]:
    norm = functools.partial(batch_norm, train=train, eps=self.eps)
    excite = functools.partial(Excite, act=self.squeeze_act, gate=self.gate)
    x = Conv(self.width, 3, 2, same=self.same, name="stem")(x)
    x = self.act(norm(x, "stem_norm"))
    for i, blocks in enumerate(self.stages):
      make = functools.partial(
        Block,
        norm=norm,
        act=jax.nn.relu if i < self.early else self.act,
        excite=excite,
        same=self.same,
        hooks=self.hooks,
      )
      x = Stage(blocks, make, self.scan, self.remat, name=f"stage{i}")(x)
    x = Conv(self.last, 1, name="last")(x)
    x = self.act(norm(x, "last_norm")).mean((1, 2), keepdims=True)
    if self.wide:
      x = self.act(Conv(self.wide, 1, use_bias=True, name="wide")(x))
    return x.reshape(len(x), -1)
