"""What the methods that stay near pretrained weights share.

An *anchor* is what weights are held to, the pretrained ones as a rule; a *row*
is what feeds one output of a layer.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from roli_jax import trees

# `(path, leaf) -> axes` that a row extends over, or a tree of such axes.
RowAxes = Callable[[str, Any], tuple[int, ...]] | Any

_ALL_BUT_LAST = ("kernel", "a", "b", "w")
_HEADS = ("query", "key", "value")


def start(anchor: Any, params: Any) -> Any:
  """The anchors of these parameters, as copies.

  They are kept in the wider of float32 and the leaf's own dtype: FTP's first
  radius, 1e-8, is nothing in bfloat16.

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
    with contextlib.suppress(ValueError):  # said with both sides below
      anchor = jax.tree.map(
        lambda p, a: p if _is_absent(p) else a, params, anchor,
        is_leaf=_is_absent,
      )  # fmt: skip
  trees.check_same(anchor, params, "the anchor is not like the parameters")

  def copy(a, p):
    # A buffer of its own: a step may donate both.
    return jnp.array(a, jnp.promote_types(p.dtype, jnp.float32), copy=True)

  return jax.tree.map(copy, anchor, params)


def _is_absent(x: Any) -> bool:
  return x is None or isinstance(x, optax.MaskedNode)


def check(params: Any, method: str) -> None:
  """Raises a ValueError where an update was not given the parameters."""
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
  """The axes that a row of a leaf extends over, by the layouts of Flax.

  The authors of FTP and SPD sum over all but the first axis of PyTorch's
  tensors, one output's weights. In Flax that is all but the last axis of a
  kernel; of a kernel that makes queries, keys or values of several heads, all
  but the last two; of an embedding all but the first. What else there is
  (biases, scales, tokens, positions) is one row.

  Args:
    path: the path of the leaf, `backbone/block3/attn/q/kernel`.
    leaf: an array, or its shape and dtype.
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


def axes_of(row_axes: RowAxes | None, params: Any) -> Any:
  """A tree like params of functions that sum over each leaf's rows."""
  if row_axes is None or callable(row_axes):
    find = row_axes or default_axes
    return trees.map_named(lambda path, x: _summed(find(path, x)), params)
  return jax.tree.map(lambda _, axes: _summed(axes), params, row_axes)


def _summed(axes):
  return lambda x: jnp.sum(x, axis=axes, keepdims=True)


class Adam:
  """Adam on one number a leaf, as the authors of FTP and DiGraP have it.

  The moments see their first gradient at step 2, and are corrected as if they
  had seen one at step 1: the first increment is 0.744 of the rate.
  """

  def __init__(self, rate: Any, b1: Any, b2: Any, eps: Any):
    self.rate, self.b1, self.b2, self.eps = rate, b1, b2, eps

  def step(self, x: Any, grad: Any, m: Any, v: Any, t: Any) -> Any:
    """The number after step t = 1, 2, ..., and its moments."""
    m = jnp.where(t == 1, 0, self.b1 * m + (1 - self.b1) * grad)
    v = jnp.where(t == 1, 0, self.b2 * v + (1 - self.b2) * grad**2)
    first, second = (m / _seen(self.b1, t, m), v / _seen(self.b2, t, v))
    return x - self.rate * first / (jnp.sqrt(second) + self.eps), m, v


def _seen(b, t, like):
  """1 - b^t, to the last digits in float32 too."""
  log = math.log(b) if b else -math.inf
  return -jnp.expm1(t.astype(like.dtype) * log)


def transposed(results: Any, like: Any, width: int) -> Any:
  """As many trees as each tuple of a tree of tuples has members."""
  outer, inner = map(jax.tree.structure, (like, (0,) * width))
  return jax.tree.transpose(outer, inner, results)
