"""XLA's scheduled modules as text, read into instructions."""

import functools
import math
import re
from typing import NamedTuple

# Bits of a number, by the letters and digits of its type.
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")


class Array(NamedTuple):
  """An array of a module.

  Attributes:
    dims: its shape.
    bits: of one number.
    space: the memory that it lies in; 0 is the chip's main memory.
  """

  dims: tuple[int, ...]
  bits: int
  space: int

  @property
  def bytes(self) -> int:
    """Bytes, without what a layout pads."""
    return math.prod(self.dims) * self.bits // 8


class Instruction(NamedTuple):
  """One line of a computation.

  Attributes:
    name: unique in its computation.
    opcode: what it does, as `fusion`.
    result: the arrays that it writes, of a tuple all of them.
    operands: the names of what it reads.
    rest: its attributes, as text.
    is_root: whether its result is the computation's.
  """

  name: str
  opcode: str
  result: tuple[Array, ...]
  operands: tuple[str, ...]
  rest: str
  is_root: bool

  def called(self, attribute: str) -> list[str]:
    """The computations that an attribute names, as `calls` or `body`."""
    found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.rest)
    return _NAME.findall(found[1]) if found else []


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """Returns the computations by name, and the entry's name.

  Args:
    text: the module, `compiled.as_text()`.

  Raises:
    ValueError: the text is no module.
  """
  computations: dict[str, Computation] = {}
  entry, current = "", None
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head:
      current = computations.setdefault(head[1], {})
      entry = head[1] if line.startswith("ENTRY") else entry
    elif current is not None and (found := _LINE.match(line)):
      x = _instruction(found[2], found[3], bool(found[1]))
      current[x.name] = x
  if not entry:
    raise ValueError("the text is no module of XLA's: it has no ENTRY")
  return computations, entry


def _instruction(name: str, said: str, is_root: bool) -> Instruction:
  end = _closing(said, 0) if said[0] == "(" else said.index(" ")
  opcode, start = said[end:].split("(", 1)[0].strip(), said.index("(", end)
  close = _closing(said, start)
  inside, rest = said[start + 1 : close - 1], said[close:]
  if opcode in ("constant", "parameter"):
    return Instruction(name, opcode, _arrays(said[:end]), (), inside, is_root)
  operands = tuple(_NAME.findall(inside))
  return Instruction(name, opcode, _arrays(said[:end]), operands, rest, is_root)


def _closing(text: str, start: int) -> int:
  """The place behind the parenthesis that closes the one at `start`."""
  depth = 0
  for at in range(start, len(text)):
    depth += (text[at] == "(") - (text[at] == ")")
    if not depth:
      return at + 1
  raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


@functools.lru_cache(65536)
def _arrays(text: str) -> tuple[Array, ...]:
  return tuple(
    Array(_dims(dims), _bits(dtype), _space(layout))
    for dtype, dims, layout in _ARRAY.findall(text)
  )


def _dims(text: str) -> tuple[int, ...]:
  return tuple(int(n.lstrip("<=")) for n in text.split(",") if n)


def _bits(dtype: str) -> int:
  if dtype in _BITS:
    return _BITS[dtype]
  digits = re.match(r"[a-z]+(\d+)", dtype)
  return int(digits[1]) if digits else 0


def _space(layout: str) -> int:
  found = re.search(r"S\((\d+)\)", layout)
  return int(found[1]) if found else 0
