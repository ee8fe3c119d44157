"""A traced program: its operations, their FLOPs, what waits for a gradient."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from jax.extend import core


class Array:
  """An array of a program; another array is not equal to it."""

  def __init__(self, aval: Any):
    self.shape: tuple[int, ...] = aval.shape
    self.dtype = aval.dtype


class Op(NamedTuple):
  """One primitive operation; loops and `remat` are one, with what is inside."""

  name: str
  params: dict[str, Any]
  reads: list[Array]
  writes: list[Array]


class Program:
  """A jaxpr whose calls are inlined, and of whose branches the last stands."""

  def __init__(self, jaxpr: core.Jaxpr):
    self.ops: list[Op] = []
    self.inputs = [Array(var.aval) for var in jaxpr.invars]
    self.outputs = self._inline(jaxpr, self.inputs)

  def needed(self, outputs: Iterable[Array]) -> list[Op]:
    """The operations that these come from, in order."""
    wanted, ops = set(outputs), []
    for op in reversed(self.ops):
      if not wanted.isdisjoint(op.writes):
        wanted.update(op.reads)
        ops.append(op)
    return ops[::-1]

  def _inline(self, jaxpr, inputs):
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def array(atom):
      if isinstance(atom, core.Literal):
        return Array(atom.aval)
      return known.setdefault(atom, Array(atom.aval))  # or it is a constant

    for eqn in jaxpr.eqns:
      reads = [array(atom) for atom in eqn.invars]
      name, params = eqn.primitive.name, eqn.params
      if name == "cond":
        writes = self._inline(params["branches"][-1].jaxpr, reads[1:])
      elif name in _CALLS:
        writes = self._inline(params[_CALLS[name]].jaxpr, reads)
      else:
        writes = [Array(var.aval) for var in eqn.outvars]
        self.ops.append(Op(name, params, reads, writes))
      known.update(zip(eqn.outvars, writes, strict=True))
    return [array(atom) for atom in jaxpr.outvars]


# Under which name a call has what it calls.
_CALLS = {
  "jit": "jaxpr",
  "closed_call": "call_jaxpr",
  "custom_jvp_call": "call_jaxpr",
  "custom_vjp_call": "call_jaxpr",
}

# Of one operation whose inputs are those of what is inside: a loop, and a block
# that is computed again, by JAX's names for it.
_NESTED = ("scan", "remat2", "checkpoint")

# The same numbers in another layout: no memory of their own.
_VIEWS = ("reshape", "transpose", "squeeze", "broadcast_in_dim")

# What is computed again, in what reads it, at no cost that counts.
_ELEMENTWISE = {
  *_VIEWS, "abs", "add", "add_any", "and", "convert_element_type", "eq", "ge",
  "gt", "integer_pow", "le", "lt", "max", "min", "mul", "ne", "neg", "not",
  "or", "select_n", "sign", "square", "sub",
}  # fmt: skip


def bytes_kept(
  program: Program, seed: set[Array], pixels: set[Array]
) -> tuple[int, int]:
  """Bytes that hang on pixels, not the seed, and are read by what does.

  What is inside one operation at a time, as a block that is computed again,
  counts where it takes the most. Its own inputs are counted outside.

  Args:
    program: a forward and a backward pass.
    seed: the inputs on which the backward pass hangs.
    pixels: those that hold images.

  Returns:
    All of them; and what is left where elementwise operations are computed
    again in what reads them.
  """
  ops = program.needed(program.outputs)
  backward = _following(ops, seed)
  of_images = _following(ops, pixels) - backward
  source: dict[Array, Array] = {}
  kept: set[Array] = set()
  whole: set[Array] = set()
  most = (0, 0)
  for op in ops:
    if op.name in _VIEWS:
      source[op.writes[0]] = source.get(op.reads[0], op.reads[0])
    if backward.isdisjoint(op.writes):
      continue
    read = {source.get(x, x) for x in op.reads if x in of_images}
    kept |= read
    if op.name not in _ELEMENTWISE:
      whole |= read
    if op.name in _NESTED:
      inner = Program(*core.jaxprs_in_params(op.params))
      inputs = list(zip(inner.inputs, op.reads, strict=True))
      again = bytes_kept(
        inner,
        {mine for mine, x in inputs if x in backward},
        {mine for mine, x in inputs if x in of_images},
      )
      most = max(most, again)
  own, less = (
    sum(_bytes(x) for x in arrays.difference(program.inputs))
    for arrays in (kept, _fused(ops, kept, whole, of_images))
  )
  return most[0] + own, most[1] + less


def _fused(
  ops: list[Op],
  kept: set[Array],
  whole: set[Array],
  of_images: set[Array],
) -> set[Array]:
  """What is kept of these where elementwise operations are computed again.

  Args:
    ops: in order.
    kept: what is read later.
    whole: those of them that a product, or another operation that nothing is
      fused into, reads.
    of_images: other arrays cost nothing.
  """
  maker = {x: op for op in ops for x in op.writes}

  def origins(x: Array) -> set[Array]:
    found, seen, waiting = set(), set(), list(maker[x].reads)
    while waiting:
      y = waiting.pop()
      if y in seen or y not in of_images:
        continue
      seen.add(y)
      if y not in kept and y in maker and maker[y].name in _ELEMENTWISE:
        waiting += maker[y].reads
      else:
        found.add(y)
    return found

  for op in reversed(ops):
    for x in kept.intersection(op.writes) - whole:
      if op.name in _ELEMENTWISE:
        instead = origins(x)
        if sum(map(_bytes, instead - kept)) < _bytes(x):
          kept = (kept - {x}) | instead
  return kept


def _bytes(x: Array) -> int:
  return math.prod(x.shape) * x.dtype.itemsize


def _following(ops: list[Op], arrays: set[Array]) -> set[Array]:
  """These, and all that is computed from them."""
  seen = set(arrays)
  for op in ops:
    if not seen.isdisjoint(op.reads):
      seen.update(op.writes)
  return seen


def count(jaxpr: core.Jaxpr) -> int:
  """FLOPs of what the results need."""
  program = Program(jaxpr)
  return work(program.needed(program.outputs))


def work(ops: list[Op]) -> int:
  """FLOPs of the operations and of what is inside of them."""
  total = 0
  for name, params, reads, writes in ops:
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      depth = math.prod(reads[0].shape[axis] for axis in contracted)
      total += 2 * math.prod(writes[0].shape) * depth
    elif name == "conv_general_dilated":
      total += _convolution(params, reads[1].shape, writes[0].shape)
    else:
      inside = sum(count(inner) for inner in core.jaxprs_in_params(params))
      if name == "while" and inside:
        raise ValueError(
          "a while_loop whose length is not known has products inside; count"
          " one turn of it, or give fori_loop a number"
        )
      total += inside * params.get("length", 1)
  return total


def _convolution(params, kernel, result):
  """Each value of the result is a sum over the kernel, zeros left out."""
  features = kernel[params["dimension_numbers"].rhs_spec[0]]
  products = math.prod(result) * (math.prod(kernel) // features)
  return 2 * products // math.prod(params["lhs_dilation"])
