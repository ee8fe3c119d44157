"""What a compiled program moves, computes and sends, read from its own text.

XLA's `cost_analysis` counts the bodies of loops once, can't tell main memory
from on-chip memory, and says nothing for GPUs. The scheduled module's text has
all of it: each instruction with its operands, its result, and the memory where
these lie.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence

import numpy as np

from roli_jax.plan import hlo_text
from roli_jax.plan.hlo_text import Array, Computation, Instruction

_COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
# They name an array that another instruction has written, or hold a number.
_FREE = (
  "parameter",
  "constant",
  "get-tuple-element",
  "tuple",
  "bitcast",
  "after-all",
  "partition-id",
  "replica-id",
  "opt-barrier",
)


@dataclasses.dataclass(frozen=True)
class Count:
  """What one device does when the program runs once, loops multiplied out.

  Attributes:
    flops: FLOPs of products and convolutions; a multiply-add is two.
    traffic: bytes of main memory that are read and written: each instruction's
      operands and results that lie there, of a slice what is sliced.
    custom_traffic: those of them that custom calls read and write.
    in_loop: collectives inside loops, counted as instructions.
    outside: collectives outside.
    bytes_in_loop: bytes of what the collectives in loops send or receive, the
      larger of the two.
    bytes_outside: those of the others.
  """

  flops: int = 0
  traffic: int = 0
  custom_traffic: int = 0
  in_loop: int = 0
  outside: int = 0
  bytes_in_loop: int = 0
  bytes_outside: int = 0

  def __add__(self, other: "Count") -> "Count":
    mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
    return Count(*(a + b for a, b in zip(mine, theirs, strict=True)))

  def repeated(self, trips: int) -> "Count":
    """What a loop of so many turns does; it has each collective once."""
    return Count(
      flops=trips * self.flops,
      traffic=trips * self.traffic,
      custom_traffic=trips * self.custom_traffic,
      in_loop=self.in_loop + self.outside,
      bytes_in_loop=trips * (self.bytes_in_loop + self.bytes_outside),
    )


def count(text: str, *, on_chip: bool = True, turns: int = 1) -> Count:
  """Counts what the scheduled module of a program does.

  Args:
    text: the module, `compiled.as_text()`.
    on_chip: whether memory spaces other than 0 lie on the chip, as a TPU's do;
      a GPU's are parts of its main memory.
    turns: how often a loop runs whose length is data, >= 1.

  Raises:
    ValueError: the text is no module.
  """
  return _Module(text, on_chip, turns).total()


class _Module:
  """A module's computations, and what each of them does."""

  def __init__(self, text: str, on_chip: bool, turns: int):
    self._computations, self._entry = hlo_text.parse(text)
    self._on_chip, self._turns = on_chip, turns
    self._flops = functools.cache(self._flops_of)

  def total(self) -> Count:
    return self._count(self._entry)

  def _count(self, name: str) -> Count:
    computation = self._computations[name]
    each = (self._one(computation, x) for x in computation.values())
    return sum(each, Count())

  def _one(self, computation: Computation, x: Instruction) -> Count:
    if x.opcode == "while":
      (body,), (condition,) = x.called("body"), x.called("condition")
      return self._count(body).repeated(self._trips(x, condition))
    if x.opcode == "conditional":
      branches = x.called("branch_computations")
      branches += x.called("true_computation") + x.called("false_computation")
      return max(map(self._count, branches), key=lambda c: (c.flops, c.traffic))
    if x.opcode == "call":
      return sum(map(self._count, x.called("to_apply")), Count())
    flops = self._work(computation, x)
    traffic = self._traffic(computation, x)
    custom = traffic if x.opcode == "custom-call" else 0
    if x.opcode.removesuffix("-start") not in _COLLECTIVES:
      return Count(flops, traffic, custom)
    sent = sum(a.bytes for a in _operands(computation, x))
    received = sum(a.bytes for a in x.result)
    return Count(flops, traffic, outside=1, bytes_outside=max(sent, received))

  def _trips(self, x: Instruction, condition: str) -> int:
    """The turns of a loop: XLA's own count, or the bound of its counter."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', x.rest)
    if known:
      return int(known[1])
    lines = list(self._inside(condition))
    compared = [i for i in lines if i.opcode == "compare"]
    bounds = [
      int(i.rest) for i in lines if i.opcode == "constant" and i.rest.isdigit()
    ]
    counts = len(compared) == 1 and "direction=LT" in compared[0].rest
    return bounds[0] if counts and len(bounds) == 1 else self._turns

  def _inside(self, name: str) -> Iterator[Instruction]:
    """The instructions of a computation and of its fusions."""
    for x in self._computations[name].values():
      yield x
      for called in x.called("calls"):
        yield from self._inside(called)

  def _work(self, computation: Computation, x: Instruction) -> int:
    """FLOPs of an instruction, and of what is fused in it."""
    called = x.called("calls")
    if called:
      return sum(map(self._flops, called))
    return _products(computation, x)

  def _flops_of(self, name: str) -> int:
    computation = self._computations[name]
    return sum(self._work(computation, x) for x in computation.values())

  def _traffic(self, computation: Computation, x: Instruction) -> int:
    if x.opcode in _FREE or x.opcode.endswith(("-done", "-update")):
      return 0
    if 'custom_call_target="AllocateBuffer"' in x.rest:
      return 0
    if x.opcode in ("copy-start", "slice-start", "async-start"):
      # The result is (operand, copy, semaphore) in some order, and as much is
      # read as is written: the smaller of the two arrays.
      big = [a for a in x.result if a.bits and math.prod(a.dims) > 1]
      size = min((a.bytes for a in big), default=0)
      sides = [a for a in big if self._is_main(a)]
      return size * min(len(sides), 2)
    if x.opcode in ("dynamic-slice", "slice", "gather"):
      return 2 * self._main(x.result)
    if x.opcode == "dynamic-update-slice":
      return 2 * self._main(computation[x.operands[1]].result)
    if x.opcode == "fusion":
      return self._of_fusion(computation, x)
    return self._main(_operands(computation, x)) + self._main(x.result)

  def _of_fusion(self, computation: Computation, x: Instruction) -> int:
    """What a fusion reads and writes.

    Of an operand that is only sliced inside, the slices; of one that is
    updated in place, the update.
    """
    (name,) = x.called("calls")
    written = self._main(x.result)
    for update, inside in self._updates(name):
      whole = sum(a.bytes for a in update.result)
      if whole <= written:
        part = sum(a.bytes for a in inside[update.operands[1]].result)
        written += part - whole
    read = 0
    for at, operand in enumerate(x.operands):
      whole = self._main(computation[operand].result)
      if whole and x.operands.index(operand) == at:
        read += min(whole, self._read(name, at, whole))
    return read + written

  def _read(self, name: str, at: int, whole: int) -> int:
    """Bytes that a fused computation reads of its parameter of that number.

    Args:
      name: the computation's.
      at: the parameter's number.
      whole: the bytes of all of the parameter.
    """
    fused = self._computations[name]
    aliases = {
      i.name
      for i in fused.values()
      if i.opcode == "parameter" and int(i.rest.split(")")[0]) == at
    }
    total, uses = 0, 0
    for i in fused.values():
      if not aliases.intersection(i.operands):
        continue
      uses += 1
      if i.opcode == "bitcast" and not i.is_root:
        aliases.add(i.name)
      elif i.opcode == "fusion":
        (inner,) = i.called("calls")
        places = [k for k, o in enumerate(i.operands) if o in aliases]
        total += sum(self._read(inner, k, whole) for k in places)
      elif _slices(i, aliases):
        total += _sliced(i)
      else:
        return whole
    return total if uses else whole

  def _updates(self, name: str) -> Iterator[tuple[Instruction, Computation]]:
    """The updates in place of a fused computation, and where they stand."""
    fused = self._computations[name]
    for i in fused.values():
      if i.opcode == "dynamic-update-slice":
        yield i, fused
      elif i.opcode == "fusion":
        yield from self._updates(i.called("calls")[0])

  def _is_main(self, array: Array) -> bool:
    return not (self._on_chip and array.space)

  def _main(self, arrays: Sequence[Array]) -> int:
    """Bytes of those that lie in main memory."""
    return sum(a.bytes for a in arrays if self._is_main(a))


def _slices(use: Instruction, names: Container[str]) -> bool:
  """Whether it reads or replaces a part of its operand of these names."""
  parts = ("dynamic-slice", "slice", "gather", "dynamic-update-slice")
  return use.opcode in parts and use.operands[0] in names


def _sliced(use: Instruction) -> int:
  if use.opcode == "dynamic-update-slice":
    return 0  # what is written is counted with the result
  return sum(a.bytes for a in use.result)


def _operands(computation: Computation, x: Instruction) -> list[Array]:
  """The arrays that it reads, each once."""
  return [
    array
    for name in dict.fromkeys(x.operands)
    for array in computation[name].result
  ]


def _products(computation: Computation, x: Instruction) -> int:
  """FLOPs of a product or convolution, 0 of all else."""
  if x.opcode not in ("dot", "convolution", "custom-call"):
    return 0
  read = [computation[name].result[0] for name in x.operands[:2]]
  if len(read) < 2:
    return 0
  left, right = read
  if x.opcode == "dot":
    return _dot(x.result[0], left, _listed(x.rest, "lhs_contracting_dims"))
  if x.opcode == "convolution":
    return _convolution(x.rest, left, right, x.result[0])
  target = re.search(r'custom_call_target="([^"]+)"', x.rest)
  name = target[1] if target else ""
  if "gemm" in name or "cublas" in name:
    return _dot(x.result[0], left, _gemm_depth(x.rest))
  if name.startswith("__cudnn$fmha"):
    # Scores and mixture; backwards the scores again, and four gradients.
    return (5 if "Backward" in name else 2) * _scores(x.rest) * left.dims[-1]
  if name.startswith("__cudnn$conv"):
    roles = {
      "__cudnn$convBackwardInput": (x.result[0], right, left),
      "__cudnn$convBackwardFilter": (left, x.result[0], right),
    }
    return _convolution(x.rest, *roles.get(name, (left, right, x.result[0])))
  return 0


def _dot(result: Array, left: Array, contracted: Sequence[int]) -> int:
  depth = math.prod(left.dims[axis] for axis in contracted)
  return 2 * math.prod(result.dims) * depth


def _listed(text: str, name: str) -> list[int]:
  found = re.search(rf"\b{name}=\{{([\d,]*)\}}", text)
  return [int(n) for n in found[1].split(",") if n] if found else []


def _gemm_depth(text: str) -> list[int]:
  """The contracted axes of the left operand, from cuBLAS' settings."""
  found = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', text)
  return [int(n) for n in json.loads(found[1])] if found else []


def _scores(text: str) -> int:
  """FLOPs by channel of one product of cuDNN's attention: two a score."""
  found = re.search(
    r'"intermediate_tensor_shape": ?\{[^{]*?"dimensions": ?(\[[^\]]*\])', text
  )
  return 2 * math.prod(map(int, json.loads(found[1]))) if found else 0


def _convolution(text: str, left: Array, right: Array, result: Array) -> int:
  """FLOPs of a convolution; products with padding or holes don't count.

  A TPU writes batched products as convolutions over a dilated axis, where all
  but one in many places are holes.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
  if not labels:
    return 0
  images, kernels, outs = (
    dict(zip(labels[i + 1], array.dims, strict=False))
    for i, array in enumerate((left, right, result))
  )
  window = _window(text)
  places = 1
  for axis in (c for c in images if c.isdigit()):
    settings = {name: values[int(axis)] for name, values in window.items()}
    places *= _pairs(images[axis], kernels[axis], outs[axis], settings)
  return 2 * outs["b"] * outs["f"] * kernels["i"] * places


def _window(text: str) -> dict[str, list[int]]:
  """What `window={...}` says for each axis; of padding, what stands before."""
  found = re.search(r"window=\{([^}]*)\}", text)
  fields = (field.split("=") for field in (found[1].split() if found else ()))
  return {
    name: [int(value.partition("_")[0]) for value in values.split("x")]
    for name, values in fields
    if name != "rhs_reversal"
  }


def _pairs(
  images: int, kernels: int, outs: int, window: Mapping[str, int]
) -> int:
  """Pairs of an output and a kernel's place that meet a pixel, on one axis."""
  starts = np.arange(outs) * window.get("stride", 1) - window.get("pad", 0)
  at = starts[:, None] + np.arange(kernels) * window.get("rhs_dilate", 1)
  holes = window.get("lhs_dilate", 1)
  inside = (at >= 0) & (at % holes == 0) & (at // holes < images)
  return int(inside.sum())
