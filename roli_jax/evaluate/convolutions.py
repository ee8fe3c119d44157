"""Users' convolutions, as a CPU computes them fast in loops, where attacks are.

XLA has a fast kernel for maps with channels last and kernels with the output's
channels last. Outside of loops it brings others into this order; inside it
doesn't. Maps with channels first take up to 80 times as long there, gradients
by a map up to three times: JAX names the kernel the other way round, and
dilates what comes down (docs/evaluation.md).
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import (
  ClosedJaxpr,
  Jaxpr,
  JaxprEqn,
  jaxpr_as_fun,
  jaxprs_in_params,
)
from jax.extend.core.primitives import conv_general_dilated_p
from jax.lax import ConvDimensionNumbers

# A map or a kernel; a user's constant may be NumPy's.
Operand = jax.Array | np.ndarray


def made_fast(fn: Callable[..., Any]) -> Callable[..., Any]:
  """The function with its convolutions in order; traced in each call."""

  def call(*args: Any) -> Any:
    # A new function: JAX remembers traces by the function.
    traced = jax.make_jaxpr(lambda *args: fn(*args))(*args)
    return jaxpr_as_fun(_closed(traced))(*jax.tree.leaves(args))[0]

  return call


def has_any(jaxpr: Jaxpr) -> bool:
  """Whether there is a convolution anywhere in it that would change."""
  return any(
    _would_change(eqn) or any(map(has_any, jaxprs_in_params(eqn.params)))
    for eqn in jaxpr.eqns
  )


def _would_change(eqn: JaxprEqn) -> bool:
  """Whether it is a convolution whose gradient `_by_map` can be.

  That is one of all channels, of a map that isn't dilated and of one dtype, and
  not both strided and with a dilated kernel.
  """
  params = eqn.params
  if eqn.primitive is not conv_general_dilated_p:
    return False
  strided = max(params["window_strides"], default=1) > 1
  dilated = max(params["rhs_dilation"], default=1) > 1
  return (
    params["feature_group_count"] == params["batch_group_count"] == 1
    and max(params["lhs_dilation"], default=1) == 1
    and not (strided and dilated)
    and len({_shape(x).dtype for x in (*eqn.invars, *eqn.outvars)}) == 1
  )


def _shape(atom: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype)


def _closed(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
  return ClosedJaxpr(_opened(jaxpr.jaxpr), jaxpr.consts)


def _opened(jaxpr: Jaxpr) -> Jaxpr:
  return jaxpr.replace(eqns=list(map(_replaced, jaxpr.eqns)))


def _replaced(eqn: JaxprEqn) -> JaxprEqn:
  """The operation, or another one where it or one inside of it would change."""
  if _would_change(eqn):
    shapes = map(_shape, eqn.invars)
    (ours,) = jax.make_jaxpr(_convolution(eqn.params))(*shapes).eqns
    return ours.replace(invars=eqn.invars, outvars=eqn.outvars)
  if not any(map(has_any, jaxprs_in_params(eqn.params))):
    return eqn
  inner = {name: _replaced_in(value) for name, value in eqn.params.items()}
  return eqn.replace(params=inner)


def _replaced_in(param: Any) -> Any:
  if isinstance(param, tuple):  # branches
    return tuple(map(_replaced_in, param))
  if isinstance(param, ClosedJaxpr):
    return _closed(param)
  return _opened(param) if isinstance(param, Jaxpr) else param


def _convolution(params: Mapping[str, Any]) -> Callable[..., jax.Array]:
  """The convolution of a map and a kernel, itself and its gradient in order."""
  strides, padding = params["window_strides"], params["padding"]
  numbers = params["dimension_numbers"]
  of_map, of_output = (
    (batch, *sides, channels)
    for batch, channels, *sides in (numbers.lhs_spec, numbers.out_spec)
  )
  out, into, *sides = numbers.rhs_spec
  of_kernel = (*sides, into, out)
  last = 1 + len(sides)
  axes = (0, last, *range(1, last))
  convolve = functools.partial(
    jax.lax.conv_general_dilated,
    rhs_dilation=params["rhs_dilation"],
    dimension_numbers=ConvDimensionNumbers(
      axes, (last, last - 1, *range(last - 1)), axes
    ),
    precision=params["precision"],
    preferred_element_type=params["preferred_element_type"],
  )

  def forward(x: Operand, kernel: Operand) -> jax.Array:
    x, kernel = jnp.transpose(x, of_map), jnp.transpose(kernel, of_kernel)
    y = convolve(x, kernel, strides, padding)
    return jnp.transpose(y, _inverse(of_output))

  def backward(
    saved: tuple[Operand, Operand], g: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    # Linear in the kernel: where its gradient isn't read, XLA leaves it out.
    (by_kernel,) = jax.vjp(lambda kernel: forward(x, kernel), kernel)[1](g)
    seen = [
      _Side(x.shape[axis], kernel.shape[place], stride, dilation, before)
      for axis, place, stride, dilation, (before, _) in zip(
        of_map[1:-1], sides, strides, params["rhs_dilation"], padding,
        strict=True,
      )
    ]  # fmt: skip
    by_map = _by_map(
      convolve, seen, jnp.transpose(kernel, of_kernel),
      jnp.transpose(g, of_output),
    )  # fmt: skip
    return jnp.transpose(by_map, _inverse(of_map)), by_kernel

  convolution = jax.custom_vjp(forward)
  convolution.defvjp(
    lambda x, kernel: (forward(x, kernel), (x, kernel)), backward
  )
  return convolution


class _Side(NamedTuple):
  """A side of a convolution, its lengths in places of the map.

  Attributes:
    length: the map's.
    kernel: the kernel's.
    stride: >= 1.
    dilation: of the kernel, 1 where there is a stride.
    before: how much is padded before the map; less than 0 cuts.
  """

  length: int
  kernel: int
  stride: int
  dilation: int
  before: int

  @property
  def steps(self) -> int:
    """How many outputs see a place of the map."""
    return -(-self.kernel // self.stride)

  @property
  def phases(self) -> int:
    """How many of the places between two outputs the kernel reaches."""
    return min(self.kernel, self.stride)

  @property
  def first(self) -> int:
    """The stride in which the map begins."""
    return self.before // self.stride

  @property
  def strides(self) -> int:
    """How many strides the map touches."""
    end = (self.length - 1 + self.before) // self.stride
    return end + 1 - self.first


def _by_map(
  convolve: Callable[..., jax.Array],
  sides: Sequence[_Side],
  kernel: jax.Array,
  g: jax.Array,
) -> jax.Array:
  """The gradient by the map: of stride 1, with a channel for each phase.

  Place s q + r of the padded map is seen by the outputs q - t, through place
  s t + r of the kernel: there is nothing dilated in the sum over t.

  Args:
    convolve: takes a map, a kernel, strides and padding, in order.
    sides: the convolution's.
    kernel: [*sides, c, d].
    g: what comes down, [b, *outputs, d].

  Returns:
    [b, *sides, c].
  """
  n, (c, d) = len(sides), kernel.shape[-2:]
  steps, phases = [s.steps for s in sides], [s.phases for s in sides]
  missing = [(0, s.steps * s.phases - s.kernel) for s in sides]
  kernel = jnp.pad(kernel, (*missing, (0, 0), (0, 0)))
  kernel = kernel.reshape(
    *itertools.chain(*zip(steps, phases, strict=True)), c, d
  )
  of_steps, of_phases = range(0, 2 * n, 2), range(1, 2 * n, 2)
  kernel = jnp.flip(kernel, tuple(of_steps))
  kernel = kernel.transpose(*of_steps, 2 * n + 1, *of_phases, 2 * n)
  padding = []
  for s, outputs in zip(sides, g.shape[1:-1], strict=True):
    before = (s.steps - 1) * s.dilation - s.first
    padding.append((before, s.strides - outputs + s.first))
  y = convolve(g, kernel.reshape(*steps, d, -1), (1,) * n, padding)
  y = y.reshape(*y.shape[:-1], *phases, c)
  unreached = [(0, s.stride - s.phases) for s in sides]
  y = jnp.pad(y, ((0, 0),) * (1 + n) + (*unreached, (0, 0)))
  pairs = itertools.chain(*((1 + i, 1 + n + i) for i in range(n)))
  y = y.transpose(0, *pairs, 1 + 2 * n)
  y = y.reshape(len(g), *(s.strides * s.stride for s in sides), c)
  for i, s in enumerate(sides):
    start = s.before - s.first * s.stride
    y = jax.lax.slice_in_dim(y, start, start + s.length, axis=1 + i)
  return y


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
  """The order that undoes another one."""
  return tuple(map(order.index, range(len(order))))
