"""CoAtNet (Dai et al. 2021): stages that convolve, then stages that attend.

As timm's `coatnet_*_rw` compute it, which normalise and activate before they
widen.
"""

import functools
from typing import Any, ClassVar

import jax
from flax import linen as nn

from roli_jax.models import layers
from roli_jax.models.conv import Conv
from roli_jax.models.hooks import Hooks
from roli_jax.models.preact import Excite
from roli_jax.models.resnet import Map, Stage, batch_norm
from roli_jax.models.stem import layer_norm
from roli_jax.models.swin import WindowAttention
from roli_jax.types import Array, Float

_HEAD = 32  # channels of a head


def _halved(x: Map) -> Map:
  """The mean of each 2 x 2 places."""
  b, h, w, c = x.shape
  return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


class ConvBlock(nn.Module):
  """x + an inverted residual of x with gates, normalised before it widens.

  Attributes:
    width: channels after the block.
    pooled: see `Coatnet`; likewise `squeeze_first` and `squeeze_act`.
    squeeze_first: see there.
    squeeze_act: see there.
    norm: of batches, called as `norm(x, name=...)`.
    hooks: where a method may enter.
    stride: of the block, 1 or 2.
  """

  width: int
  pooled: bool
  squeeze_first: bool
  squeeze_act: layers.Activation
  norm: functools.partial[Map]
  hooks: Hooks
  stride: int = 1

  @nn.compact
  def __call__(self, x: Map) -> Map:
    hidden = 4 * x.shape[-1]
    conv = functools.partial(Conv, size=1, hooks=self.hooks)
    gates = Excite(hidden // 4, act=self.squeeze_act, name="excite")
    y = jax.nn.silu(self.norm(x, name="norm"))
    stride = self.stride
    if stride == 2:
      x = _halved(x)
      if self.pooled:
        y, stride = _halved(y), 1
    if x.shape[-1] != self.width:
      x = Conv(self.width, 1, name="shortcut")(x)
    y = jax.nn.silu(self.norm(conv(hidden, name="expand")(y), "expand_norm"))
    y = Conv(hidden, 3, stride, hidden, name="depthwise")(y)
    y = gates(y) if self.squeeze_first else y
    y = jax.nn.silu(self.norm(y, name="depthwise_norm"))
    y = y if self.squeeze_first else gates(y)
    y = conv(self.width, name="project")(y)
    if self.hooks.branch:
      y = self.hooks.branch(name="branch")(y)
    return x + y


class AttentionBlock(nn.Module):
  """x + attention among all places, then x + an MLP; each of x normalised.

  Attributes:
    width: channels after the block; attention has those before it.
    use_bias: see `Coatnet.shortcut_bias`.
    eps: what layer normalisations add to variances, > 0.
    hooks: where a method may enter.
    attention: which of `Coatnet.attentions`.
    stride: of the block, 1 or 2.
  """

  width: int
  use_bias: bool
  eps: float
  hooks: Hooks
  attention: str
  stride: int = 1

  @nn.compact
  def __call__(self, x: Map) -> Map:
    y = layer_norm(x, "norm1", eps=self.eps)
    if self.stride == 2:
      x, y = _halved(x), _halved(y)
    b, side, _, d = y.shape
    if d != self.width:
      x = Conv(self.width, 1, use_bias=self.use_bias, name="shortcut")(x)
    attention = WindowAttention(
      d // _HEAD, side, self.hooks, self.attention, self.width, name="attn"
    )
    x = x + attention(y.reshape(b, 1, -1, d), None).reshape(x.shape)
    y = layer_norm(x, "norm2", eps=self.eps)
    y = layers.Mlp(4 * self.width, name="mlp")(y)
    if self.hooks.branch:
      y = self.hooks.branch(name="branch")(y)
    return x + y


class Coatnet(nn.Module):
  """A CoAtNet whose feature is the mean of its normalised last map.

  Attributes:
    depths: blocks of each stage; the first half of the stages convolves.
    widths: channels of each stage; what comes to one that attends is a multiple
      of 32.
    stem_widths: channels of the two convolutions in front.
    pooled: whether a stage that convolves begins with the mean of each 2 x 2
      places; otherwise its first depthwise convolution has the stride.
    squeeze_first: whether gates stand before the normalisation of what they
      gate; otherwise after its activation.
    squeeze_act: the activation within gates.
    shortcut_bias: whether shortcuts to another width have a bias in stages that
      attend.
    stride: of the first convolution. Each stage has a stride of 2.
    eps: what layer normalisations add to variances, > 0.
    hooks: where a method may enter.
    attention: which of `attentions`.
    scan: see `layers.repeat`.
    remat: see `layers.repeat`.
  """

  depths: tuple[int, ...]
  widths: tuple[int, ...]
  stem_widths: tuple[int, int]
  pooled: bool = False
  squeeze_first: bool = False
  squeeze_act: layers.Activation = jax.nn.silu
  shortcut_bias: bool = True
  stride: int = 2
  eps: float = 1e-6
  hooks: Hooks = Hooks()
  attention: str = "plain"
  scan: bool = False
  remat: bool = False
  # Those of `layers.ATTENTIONS` that take a bias.
  attentions: ClassVar[tuple[str, ...]] = ("plain", "looped")

  @property
  def patch(self) -> int:
    """The side in pixels of what a place of the first stage stands for."""
    return 2 * self.stride

  @nn.compact
  def __call__(self, x: Map, *, train: bool = False) -> Float[Array, "b d"]:
    whole = self.stride * 2 ** len(self.depths)
    if x.shape[1] != x.shape[2] or x.shape[1] % whole:
      raise ValueError(
        f"this CoAtNet takes square images whose side is a multiple of {whole},"
        f" got {x.shape[1]} x {x.shape[2]}"
      )
    norm = functools.partial(batch_norm, train=train, eps=1e-5)
    first, second = self.stem_widths
    x = Conv(first, 3, self.stride, name="stem0")(x)
    x = jax.nn.silu(norm(x, "stem_norm"))
    x = Conv(second, 3, name="stem1")(x)
    block: functools.partial[Any]
    for i, (depth, width) in enumerate(
      zip(self.depths, self.widths, strict=True)
    ):
      if i < len(self.depths) // 2:
        block = functools.partial(
          ConvBlock, width, self.pooled, self.squeeze_first, self.squeeze_act,
          norm, self.hooks,
        )  # fmt: skip
      else:
        block = functools.partial(
          AttentionBlock, width, self.shortcut_bias, self.eps, self.hooks,
          self.attention,
        )  # fmt: skip
      stage = Stage(block, depth, 2, self.scan, self.remat, name=f"stage{i}")
      x = stage(x)
    return layer_norm(x, "norm", eps=self.eps).mean((1, 2))
