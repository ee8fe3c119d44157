"""Nearest points: of an L1 ball, or of a hyperplane, within a box.

Each image is a row of its own. The multipliers are solved for exactly, on the
straight piece of a sum that falls in pieces.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax.types import Array, Bool, Float, Int, Integer

# One row an image, d values each; one number an image.
Rows = Float[Array | np.ndarray, "b d"]
Column = Float[Array | np.ndarray, "b 1"]
Flags = Bool[Array | np.ndarray, "b d"]
Flag = Bool[Array | np.ndarray, "b 1"]
Bits = Int[Array, "b 1"]


def onto_l1_ball(offset: Rows, room: Rows, radius: Column) -> Rows:
  """The nearest offset whose absolute values sum to at most the radius.

  min(max(|v| - a, 0), room) with the least a >= 0 that will do (Croce and Hein
  2021, "Mind the box", proposition 2.1).

  Args:
    offset: v, any finite values, [b, d].
    room: how far each value may move in its offset's direction, >= 0, [b, d].
    radius: the radius of each row's ball, >= 0, [b, 1].
  """
  lengths = jnp.abs(offset)

  def total(a: float | Column) -> Column:
    return _sum(jnp.clip(lengths - a, 0, room))

  def halve(_: Any, bracket: tuple[Column, Column]) -> tuple[Column, Column]:
    low, high = bracket
    middle = (low + high) / 2
    over = total(middle) > radius
    return jnp.where(over, middle, low), jnp.where(over, high, middle)

  # The sum falls in straight pieces: halving finds the piece.
  high = lengths.max(1, keepdims=True)
  low, high = jax.lax.fori_loop(0, 40, halve, (jnp.zeros_like(high), high))
  middle = (low + high) / 2
  free = (lengths > middle) & (lengths - middle < room)
  full = _sum(jnp.where(lengths - middle >= room, room, 0))
  exact = _sum(jnp.where(free, lengths, 0)) + full - radius
  a = jnp.where(
    free.any(1, keepdims=True), exact / jnp.maximum(_sum(free), 1), high
  )
  a = jnp.where(total(0.0) > radius, jnp.clip(a, low, high), 0)
  return jnp.sign(offset) * jnp.clip(lengths - a, 0, room)


def onto_hyperplane(
  norm: str,
  point: Rows,
  normal: Rows,
  level: Column,
  low: float | Float[Array, ""],
  high: float | Float[Array, ""],
) -> Rows:
  """The shortest way from each point to its hyperplane within the box.

  Croce and Hein 2020, "Minimally distorted adversarial examples with a fast
  adaptive boundary attack", section 3.1.

  Args:
    norm: the norm that is least, `linf`, `l2` or `l1`.
    point: within the box, [b, d].
    normal: w of the plane {u: <w, u> = level}, [b, d].
    level: the level of the plane, [b, 1].
    low: the box's lower end.
    high: the box's upper end.

  Returns:
    The displacements, [b, d]. Where the plane misses the box, they lead to the
    corner nearest to it; they are 0 where the normal is 0.
  """
  gap = _sum(normal * point) - level
  ways = -jnp.sign(normal) * jnp.where(gap < 0, -1, 1)
  room = jnp.where(ways > 0, high - point, point - low)
  slope, gap = jnp.abs(normal), jnp.abs(gap)
  if norm == "l1":
    return ways * _greedy(slope, room, gap)
  # Each value moves by min(a * weight, room) for one a.
  weight = jnp.sign(slope) if norm == "linf" else slope

  def lack(a: Column) -> tuple[Column, Column]:
    moved = jnp.minimum(a * weight, room)
    free = jnp.where(a * weight < room, weight, 0)
    return gap - _sum(slope * moved), _sum(slope * free)

  a = _first_root(lack, jnp.zeros_like(gap))
  reached = _sum(slope * room) > gap
  moved = jnp.minimum(a * weight, room)
  return ways * jnp.where(reached, moved, jnp.where(slope > 0, room, 0))


def order_statistic(lengths: Rows, at: Integer[Array, "b 1"]) -> Column:
  """Returns the value at place `at`, from 0, of each sorted row."""
  return _least(lengths, lambda v: _sum(lengths <= v) > at)


def _greedy(slope: Rows, room: Rows, gap: Column) -> Rows:
  """Uses up the room of the steepest values until the gap is closed.

  Values of the one slope that is used up in part share it.
  """
  gains = slope * room

  def used(mask: Flags) -> Column:
    return _sum(jnp.where(mask, gains, 0))

  edge = _least(slope, lambda v: used(slope > v) <= gap)
  shared = used(slope == edge)
  part = (gap - used(slope > edge)) / jnp.where(shared > 0, shared, 1)
  part = jnp.where(slope == edge, jnp.clip(part, 0, 1), 0)
  return room * jnp.where(slope > 0, jnp.where(slope > edge, 1, part), 0)


def _least(values: Rows, holds: Callable[[Column], Flag]) -> Column:
  """Returns the least number from which on a condition holds, for each row.

  Args:
    values: not negative; the condition holds at the largest.
    holds: the condition; it changes at one of the values, or holds from 0.

  The bits of floats that are not negative are ordered as they are: halving an
  interval of bits ends at the number itself, and is far faster than a sort.
  """
  kind = jnp.int64 if values.dtype == jnp.float64 else jnp.int32
  num_bits = 8 * jnp.dtype(kind).itemsize
  as_bits = functools.partial(
    jax.lax.bitcast_convert_type, new_dtype=jnp.dtype(kind)
  )
  high = as_bits(values.max(1, keepdims=True))

  def halve(_: Any, bracket: tuple[Bits, Bits]) -> tuple[Bits, Bits]:
    low, high = bracket  # it holds at high, and not below low
    middle = low + (high - low) // 2
    holding = holds(jax.lax.bitcast_convert_type(middle, values.dtype))
    return (
      jnp.where(holding, low, jnp.minimum(middle + 1, high)),
      jnp.where(holding, middle, high),
    )

  bracket = (jnp.zeros_like(high), high)
  _, high = jax.lax.fori_loop(0, num_bits, halve, bracket)
  return jax.lax.bitcast_convert_type(high, values.dtype)


def _first_root(
  fn: Callable[[Column], tuple[Column, Column]], start: Column
) -> Column:
  """Where a function that falls in straight pieces, ever flatter, is 0.

  Newton's method from the left: it never oversteps, and ends, after about as
  many rounds as pieces are crossed, where a piece is solved exactly.

  Args:
    fn: value, and minus the slope, at a point.
    start: left of the root, or at a value that is not positive: then itself.
  """

  # The point, whether it moved, and the number of rounds.
  Carry = tuple[Column, Flag, int | Int[Array, ""]]

  def go_on(carry: Carry):
    _, moved, rounds = carry
    return moved.any() & (rounds < 100)

  def newton(carry: Carry) -> Carry:
    a, _, rounds = carry
    value, slope = fn(a)
    step = jnp.where(
      (value > 0) & (slope > 0), value / jnp.where(slope > 0, slope, 1), 0
    )
    return a + step, a + step > a, rounds + 1

  first: Carry = (start, jnp.ones(start.shape, bool), 0)
  return jax.lax.while_loop(go_on, newton, first)[0]


def _sum(values: Rows | Flags) -> Float[Array, "b 1"] | Integer[Array, "b 1"]:
  """Returns the sum of each row."""
  return values.sum(1, keepdims=True)
