"""What the methods that stay near pretrained weights share.

An *anchor* is the point that weights are held to, as a rule the pretrained
weights; a *row* is the part of a kernel that feeds one output of a layer.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from roli_jax import trees
from roli_jax.types import Array, Float, Int, PyTree

Scalar = Float[Array, ""]

# `(path, leaf) -> axes` that a row extends over, or a tree of such axes.
RowAxes = Callable[[str, Any], tuple[int, ...]] | Any

_ALL_BUT_LAST = ("kernel", "a", "b", "w")
_HEADS = ("query", "key", "value")
# An array [*shape] -> its sums over each row, with axes of length 1.
RowSum = Callable[[jax.Array], jax.Array]


def start(anchor: PyTree, params: PyTree) -> PyTree:
  """Returns copies of the anchors of these parameters.

  They are kept in the wider of float32 and the leaf's own dtype: adding FTP's
  first radius, 1e-8, would be lost in bfloat16.

  Args:
    anchor: a tree like params; None for params themselves; or a function of
      params that makes one, as `optax.tree.zeros_like` for what a PEFT method
      adds. Leaves that are absent from params are left out.
    params: those that train; None and `optax.MaskedNode` are absent leaves.

  Raises:
    ValueError: the anchor is of another structure, or has other shapes.
  """
  if anchor is None:
    anchor = params
  elif callable(anchor):
    anchor = anchor(params)
  else:

    def drop_absent(p: Any, a: Any) -> Any:
      return p if _is_absent(p) else a

    with contextlib.suppress(ValueError):  # `check_same` lists both sides
      anchor = jax.tree.map(drop_absent, params, anchor, is_leaf=_is_absent)
  trees.check_same(anchor, params, "the anchor is not like the parameters")

  def copy(a: jax.Array | np.ndarray, p: jax.Array | np.ndarray) -> jax.Array:
    # Another buffer than the parameters': a step may donate both.
    return jnp.array(a, jnp.promote_types(p.dtype, jnp.float32), copy=True)

  return jax.tree.map(copy, anchor, params)


def _is_absent(x: Any) -> bool:
  return x is None or isinstance(x, optax.MaskedNode)


def check(params: PyTree, method: str) -> None:
  """Raises a ValueError if an update got no parameters."""
  if params is None:
    raise ValueError(
      f"{method} compares parameters with their anchors:"
      " call update(grads, state, params)"
    )


def check_range(name: str, value: float | int, low: float, high: float) -> None:
  """Raises a ValueError for a number outside [low, high]."""
  if not low <= value <= high:
    raise ValueError(f"{name} must be within [{low:g}, {high:g}], got {value}")


def default_axes(path: str, leaf: Any) -> tuple[int, ...]:
  """Returns the axes that a row of a leaf extends over, in Flax's layouts.

  The authors of FTP and SPD sum over all but the first axis of PyTorch's
  tensors, the weights of one output. In Flax that is all but the last axis of a
  kernel; for a kernel that makes queries, keys or values of several heads, all
  but the last two; for an embedding all but the first. All other leaves
  (biases, scales, tokens, positions) are one row.

  Args:
    path: the path of the leaf, such as `backbone/block3/attn/q/kernel`.
    leaf: an array, or a `jax.ShapeDtypeStruct`.
  """
  *parents, name = path.split("/")
  axes = tuple(range(leaf.ndim))
  if name == "embedding":
    return axes[1:]
  if name not in _ALL_BUT_LAST or leaf.ndim < 2:
    return axes
  if leaf.ndim == 3 and parents and parents[-1] in _HEADS:
    return axes[:-2]
  return axes[:-1]


def row_sums(row_axes: RowAxes | None, params: PyTree) -> PyTree:
  """Returns a tree like params of functions (`RowSum`) that sum over rows."""
  if row_axes is None or callable(row_axes):
    find = row_axes or default_axes
    return trees.map_named(lambda path, x: _row_sum(find(path, x)), params)
  return jax.tree.map(lambda _, axes: _row_sum(axes), params, row_axes)


def _row_sum(axes: tuple[int, ...] | int) -> RowSum:
  return functools.partial(jnp.sum, axis=axes, keepdims=True)


def scalars(params: PyTree, value: float | int) -> PyTree:
  """Returns a tree like params with one number, of its dtype, in each leaf.

  Each is an array of its own: a step donates its state.
  """
  return jax.tree.map(lambda x: jnp.full((), value, x.dtype), params)


class Adam:
  """Adam on one number a tensor, as the authors of FTP and DiGraP have it.

  The moments see their first gradient at step 2, and are corrected as if they
  had seen one at step 1: the first increment is 0.744 of the rate.
  """

  def __init__(
    self, rate: float | int, b1: float | int, b2: float | int, eps: float | int
  ):
    self.rate, self.b1, self.b2, self.eps = rate, b1, b2, eps

  def step(
    self, x: Scalar, grad: Scalar, m: Scalar, v: Scalar, t: Int[Array, ""]
  ) -> tuple[Scalar, Scalar, Scalar]:
    """Returns the number after step t = 1, 2, ..., and its moments m and v."""
    m = jnp.where(t == 1, 0, self.b1 * m + (1 - self.b1) * grad)
    v = jnp.where(t == 1, 0, self.b2 * v + (1 - self.b2) * grad**2)
    first, second = (m / _seen(self.b1, t, m), v / _seen(self.b2, t, v))
    return x - self.rate * first / (jnp.sqrt(second) + self.eps), m, v


def _seen(b: float | int, t: Int[Array, ""], like: Scalar) -> Scalar:
  """Returns 1 - b^t, which float32 would round where b^t is close to 1."""
  log = math.log(b) if b else -math.inf
  return -jnp.expm1(t.astype(like.dtype) * log)


def transposed(results: PyTree, like: PyTree, width: int) -> Any:
  """Turns a tree of tuples into a tuple of trees.

  Args:
    results: a tree with a tuple in place of each leaf.
    like: a tree of the same structure with leaves.
    width: the length of each tuple.
  """
  outer, inner = map(jax.tree.structure, (like, (0,) * width))
  return jax.tree.transpose(outer, inner, results)
