"""Users' convolutions, as a CPU computes them fast in loops, where attacks are.

XLA has a fast kernel for maps with channels last and kernels with the output's
channels last. Outside of loops it brings others into this order; inside it
doesn't. Maps with channels first take up to 75 times as long there, and each
gradient by a map, whose kernel JAX names the other way round, 1.3 to 3.3 times
(docs/evaluation.md).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

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
  """Whether it is a convolution, neither grouped nor of a dilated map."""
  params = eqn.params
  return (
    eqn.primitive is conv_general_dilated_p
    and params["feature_group_count"] == params["batch_group_count"] == 1
    and max(params["lhs_dilation"], default=1) == 1
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
  strides, dilations = params["window_strides"], params["rhs_dilation"]
  numbers = params["dimension_numbers"]
  of_map, of_output = (
    (batch, *sides, channels)
    for batch, channels, *sides in (numbers.lhs_spec, numbers.out_spec)
  )
  out, into, *sides = numbers.rhs_spec
  of_kernel = (*sides, into, out)
  last = 1 + len(sides)
  axes, places = (0, last, *range(1, last)), tuple(range(len(sides)))
  convolve = functools.partial(
    jax.lax.conv_general_dilated,
    rhs_dilation=dilations,
    dimension_numbers=ConvDimensionNumbers(
      axes, (last, last - 1, *places), axes
    ),
    precision=params["precision"],
    preferred_element_type=params["preferred_element_type"],
  )

  def forward(x: Operand, kernel: Operand) -> jax.Array:
    x, kernel = jnp.transpose(x, of_map), jnp.transpose(kernel, of_kernel)
    y = convolve(x, kernel, strides, params["padding"])
    return jnp.transpose(y, _inverse(of_output))

  def backward(
    saved: tuple[Operand, Operand], g: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    # Linear in the kernel: where its gradient isn't read, XLA leaves it out.
    (by_kernel,) = jax.vjp(lambda kernel: forward(x, kernel), kernel)[1](g)
    g, kernel = jnp.transpose(g, of_output), jnp.transpose(kernel, of_kernel)
    padding = []
    for i, (before, _) in enumerate(params["padding"]):
      reach = (kernel.shape[i] - 1) * dilations[i]
      seen = (g.shape[1 + i] - 1) * strides[i] + 1
      first = reach - before
      padding.append((first, x.shape[of_map[1 + i]] + reach - seen - first))
    reversed_kernel = jnp.swapaxes(jnp.flip(kernel, places), -1, -2)
    once = (1,) * len(sides)
    by_map = convolve(g, reversed_kernel, once, padding, lhs_dilation=strides)
    return jnp.transpose(by_map, _inverse(of_map)), by_kernel

  convolution = jax.custom_vjp(forward)
  convolution.defvjp(
    lambda x, kernel: (forward(x, kernel), (x, kernel)), backward
  )
  return convolution


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
  """The order that undoes another one."""
  return tuple(map(order.index, range(len(order))))
