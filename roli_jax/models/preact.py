"""Residual networks that normalise before they convolve (He et al. 2016b).

The WRNs of Zagoruyko & Komodakis 2016 and the PreActResNets, for images of 32
x 32, as RobustBench's originals compute them; what is said of their blocks here
is read in its code at 78fcc9e (model_zoo/architectures).
"""

import functools
from typing import Any

import jax
from flax import linen as nn

from roli_jax.models import layers
from roli_jax.models.conv import Conv
from roli_jax.models.hooks import Hooks
from roli_jax.models.layers import MeanSparse
from roli_jax.models.resnet import Map, Stage, batch_norm
from roli_jax.types import Array, Float


class Excite(nn.Module):
  """Squeeze-and-excitation: each channel times a gate of them all.

  Hu et al. 2018, Eq. 2 to 4: the means over the map, a layer with ReLU, a layer
  with a logistic.

  Attributes:
    hidden: the number of units between the layers.
    act: the activation of the first layer.
    gate: that of the second.
  """

  hidden: int
  act: layers.Activation = jax.nn.relu
  gate: layers.Activation = jax.nn.sigmoid

  @nn.compact
  def __call__(self, x: Map) -> Map:
    layer = functools.partial(Conv, size=1, use_bias=True)
    y = x.mean((1, 2), keepdims=True)
    y = self.act(layer(self.hidden, name="fc1")(y))
    return x * self.gate(layer(x.shape[-1], name="fc2")(y))


class PreactBlock(nn.Module):
  """x + two 3 x 3 convolutions, each after its normalisation.

  Attributes:
    width: channels after the block.
    norm: normalises, called as `norm(x, name=...)`.
    act: the activation.
    same: see `PreactResNet`; likewise `raw`, `reach`, `squeeze` and `sparse`.
    raw: see there.
    reach: see there.
    squeeze: see there.
    sparse: see there.
    hooks: where a method may enter.
    stride: the stride of the first convolution.
  """

  width: int
  norm: functools.partial[Map]
  act: layers.Activation
  same: bool
  raw: bool
  reach: int
  squeeze: int
  sparse: bool
  hooks: Hooks
  stride: int

  @nn.compact
  def __call__(self, x: Map) -> Map:
    conv = functools.partial(Conv, same=self.same)
    seam = functools.partial(conv, hooks=self.hooks)
    y = self.act(self._sparse(self.norm(x, "norm1"), "sparse1"))
    if self.stride > 1 or x.shape[-1] != self.width:
      shortcut = conv(self.width, self.reach, self.stride, name="shortcut")
      x = shortcut(x if self.raw else y)
    y = seam(self.width, 3, self.stride, name="conv1")(y)
    y = self.act(self._sparse(self.norm(y, "norm2"), "sparse2"))
    y = seam(self.width, 3, name="conv2")(y)
    if self.squeeze:
      y = Excite(self.width // self.squeeze, name="excite")(y)
    if self.hooks.branch:
      y = self.hooks.branch(name="branch")(y)
    return self._sparse(x + y, "sparse3")

  def _sparse(self, x: Map, name: str) -> Map:
    return MeanSparse(name=name)(x) if self.sparse else x


class PreactResNet(nn.Module):
  """A pre-activation ResNet; its feature is the mean of its last map.

  Attributes:
    depths: blocks of each stage.
    widths: channels of each stage.
    width: channels of the stem.
    act: the activation; SiLU in most of those of Gowal et al. 2020 and since.
    eps: what normalisations add to variances.
    same: how strides are padded, see `Conv`.
    raw: whether the shortcut of a block that changes the map's shape sees the
      block's input; otherwise what its first activation makes of it.
    reach: side of that shortcut's kernel, 1 or 3.
    last_norm: whether the last map is normalised and activated.
    squeeze: what `Excite` divides the channels by, at the end of each branch;
      0: there is none.
    sparse: whether `MeanSparse` stands before each activation, and after each
      block.
    hooks: where a method may enter.
    scan: see `layers.repeat`.
    remat: see `layers.repeat`.
  """

  depths: tuple[int, ...]
  widths: tuple[int, ...]
  width: int = 16
  act: layers.Activation = jax.nn.relu
  eps: float = 1e-5
  same: bool = False
  raw: bool = False
  reach: int = 1
  last_norm: bool = True
  squeeze: int = 0
  sparse: bool = False
  hooks: Hooks = Hooks()
  scan: bool = False
  remat: bool = False

  @property
  def depth(self) -> int:
    """The number of its layers, as WRNs count them."""
    return 2 * sum(self.depths) + 4

  @property
  def factor(self) -> int:
    """What a WRN's widths 16, 32 and 64 are multiplied by."""
    return self.widths[0] // 16

  @nn.compact
  def __call__(self, x: Map, *, train: bool = False) -> Float[Array, "b d"]:
    norm = functools.partial(batch_norm, train=train, eps=self.eps)
    x = Conv(self.width, 3, name="stem")(x)
    for i, (depth, width) in enumerate(
      zip(self.depths, self.widths, strict=True)
    ):
      block = functools.partial(
        PreactBlock, width, norm, self.act, self.same, self.raw, self.reach,
        self.squeeze, self.sparse, self.hooks,
      )  # fmt: skip
      stride = 2 if i else 1
      x = Stage(block, depth, stride, self.scan, self.remat, name=f"stage{i}")(
        x
      )
    if self.last_norm:
      x = norm(x, "norm")
      x = MeanSparse(name="sparse")(x) if self.sparse else x
      x = self.act(x)
    return x.mean((1, 2))


def WideResNet(depth: int, factor: int, **attributes: Any) -> PreactResNet:
  """The WRN-depth-factor: stages of 16, 32 and 64 channels times the factor.

  Args:
    depth: the number of layers, 6 n + 4.
    factor: >= 1.
    **attributes: further ones of `PreactResNet`.
  """
  blocks = (depth - 4) // 6
  widths = tuple(16 * 2**i * factor for i in range(3))
  return PreactResNet((blocks,) * 3, widths, **attributes)
