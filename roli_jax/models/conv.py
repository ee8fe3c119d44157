"""Convolutions, and how a CPU computes them fast."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from roli_jax.models.hooks import Hooks
from roli_jax.types import Array, Float

Map = Float[Array, "_ _ _ _"]  # [b, h, w, c]
Kernel = Float[Array, "_ _ _ _"]  # [i, j, c / groups, d]
Settings = tuple[int, bool]  # the stride, and whether padding is as `Conv.same`


class Conv(nn.Module):
  """A convolution; one of 1 x 1 is a matrix product.

  Attributes:
    width: channels after it.
    size: side of the kernel, odd.
    stride: the stride along both sides.
    groups: 1, as many as there are channels (depthwise), or a divisor of their
      number and of the width.
    use_bias: whether a bias is added.
    same: whether a stride's odd padding stands after, as in TensorFlow and
      Haiku; otherwise it is half the kernel on each side, as in PyTorch.
    hooks: where a method may enter.
  """

  width: int
  size: int
  stride: int = 1
  groups: int = 1
  use_bias: bool = False
  same: bool = False
  hooks: Hooks = Hooks()

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
    shape = (self.size, self.size, x.shape[-1] // self.groups, self.width)
    # He et al. 2015, by fan-out, as ResNets begin.
    start = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    kernel = self.param("kernel", start, shape)
    if self.hooks.kernel:
      kernel = self.hooks.kernel(self, kernel)
    x, kernel = nn.dtypes.promote_dtype(x, kernel)
    if self.size == self.stride == 1:
      x = x @ kernel[0, 0]
    elif 1 < self.groups == x.shape[-1] and self.stride == 1:
      x = _depthwise_conv(x, kernel)
    else:
      depthwise = 1 < self.groups == x.shape[-1]
      on_cpu = _thinned_out if depthwise else _convolve_by_products
      settings = (self.stride, self.same)
      x = jax.lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(on_cpu, settings),
        default=functools.partial(_convolve, settings),
      )
    if not self.use_bias:
      return x
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    return x + bias.reshape(1, 1, 1, -1)


def _padding(side: int, size: int, stride: int, same: bool) -> tuple[int, int]:
  """Before and after."""
  if not same:
    return size // 2, size // 2
  total = max((-(-side // stride) - 1) * stride + size - side, 0)
  return total // 2, total - total // 2


def _convolve(settings: Settings, x: Map, kernel: Kernel) -> Map:
  stride, same = settings
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    [_padding(n, len(kernel), stride, same) for n in x.shape[1:3]],
    feature_group_count=x.shape[-1] // kernel.shape[2],
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def _convolve_by_products(settings: Settings, x: Map, kernel: Kernel):
  """A product for each place of the kernel, or one for all of them.

  XLA's convolutions for CPUs are single-threaded inside loops, where attacks
  are: this is 2.5 to 5.5 times as fast there (docs/backbones.md).
  """
  if len(kernel) == 1:
    # GPUs' compilers abort at a strided slice that feeds a product in a loop's
    # gradient (jaxlib 0.10.2), so that this is not how they convolve.
    stride, _ = settings
    return x[:, ::stride, ::stride] @ kernel[0, 0]
  seen_from = _seen(x, len(kernel), *settings)
  places = list(itertools.product(range(len(kernel)), repeat=2))
  groups = x.shape[-1] // kernel.shape[2]
  if groups > 1:
    return sum(_by_group(seen_from(i, j), kernel[i, j]) for i, j in places)
  if x.shape[-1] < 16:  # products this thin are slow; a stem's
    patches = jnp.concatenate([seen_from(*place) for place in places], -1)
    return patches @ kernel.reshape(-1, kernel.shape[-1])
  return sum(seen_from(i, j) @ kernel[i, j] for i, j in places)


def _by_group(x: Map, kernel: Float[Array, "_ _"]) -> Map:
  """The product of each group of channels with its part of a kernel [c, d]."""
  c, d = kernel.shape
  groups = x.shape[-1] // c
  y = jnp.einsum(
    "bijgc,cgd->bijgd",
    x.reshape(*x.shape[:3], groups, c),
    kernel.reshape(c, groups, d // groups),
  )
  return y.reshape(*x.shape[:3], d)


def _seen(
  x: Map, size: int, stride: int = 1, same: bool = False
) -> Callable[..., jax.Array]:
  """`(i, j) -> ` what the kernel's place i, j sees of x, everywhere."""
  pads = [_padding(n, size, stride, same) for n in x.shape[1:3]]
  padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  rows, columns = ((n - size) // stride * stride + 1 for n in padded.shape[1:3])
  shape = (len(x), rows, columns, x.shape[-1])

  def seen_from(i: int | jax.Array, j: int | jax.Array) -> jax.Array:
    window = jax.lax.dynamic_slice(padded, (0, i, j, 0), shape)
    return window[:, ::stride, ::stride]

  return seen_from


def _depthwise(x: Map, kernel: Kernel) -> Map:
  """Each channel by itself, of stride 1.

  XLA's for CPUs takes 10 to 30 times as long as the sum of shifted maps
  (docs/backbones.md), whose own gradient compiles for long.
  """
  whole = functools.partial(_convolve, (1, False))
  return jax.lax.platform_dependent(x, kernel, cpu=_shifted, default=whole)


def _thinned_out(settings: Settings, x: Map, kernel: Kernel) -> Map:
  """Each channel by itself, with a stride: of stride 1, and then few of it."""
  stride, same = settings
  size = len(kernel)
  rows, columns = (
    slice(size // 2 - _padding(n, size, stride, same)[0], None, stride)
    for n in x.shape[1:3]
  )
  return _depthwise_conv(x, kernel)[:, rows, columns]


def _shifted(x: Map, kernel: Kernel):
  seen_from = _seen(x, len(kernel))
  return sum(
    seen_from(i, j) * kernel[i, j].reshape(1, 1, 1, -1)
    for i, j in itertools.product(range(len(kernel)), repeat=2)
  )


def _depthwise_backward(
  saved: tuple[Map, Kernel], g: Map
) -> tuple[Map, Kernel]:
  x, kernel = saved
  whole = functools.partial(_convolve, (1, False))

  def shifted(x: Map, kernel: Kernel, g: Map) -> tuple[Map, Kernel]:
    seen_from = _seen(x, len(kernel))
    places = jnp.array(list(itertools.product(range(len(kernel)), repeat=2)))
    sums = jax.lax.map(lambda at: (seen_from(*at) * g).sum((0, 1, 2)), places)
    return _shifted(g, kernel[::-1, ::-1]), sums.reshape(kernel.shape)

  def by_conv(x: Map, kernel: Kernel, g: Map) -> tuple[Map, Kernel]:
    return jax.vjp(whole, x, kernel)[1](g)

  return jax.lax.platform_dependent(x, kernel, g, cpu=shifted, default=by_conv)


_depthwise_conv = jax.custom_vjp(_depthwise)
_depthwise_conv.defvjp(
  lambda x, kernel: (_depthwise(x, kernel), (x, kernel)), _depthwise_backward
)
