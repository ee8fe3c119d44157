"""Fast Trainable Projection."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from roli_jax import specs
from roli_jax.optim import anchor as anchors
from roli_jax.types import Array, Float, Int, PyTree

_TINY = 1e-8  # added to a row's length; also the least radius

# The lengths of rows, from a tensor and the function that sums over its rows.
Length = Callable[[jax.Array, anchors.RowSum], jax.Array]
NORMS: dict[str, Length] = {
  "mars": lambda x, total: total(jnp.abs(x)),
  "l2": lambda x, total: jnp.sqrt(total(x**2)),
}


class FtpState(NamedTuple):
  """The state of `ftp`; trees are like the parameters, in >= float32.

  Attributes:
    count: int32 [], steps taken.
    anchor: a tree of float [*shape], the pretrained weights.
    radius: a tree of float [], the radius of each tensor's ball (gamma).
    m: a tree of float [], the first moment of the radius' gradient.
    v: a tree of float [], the second moment.
    displaced: a tree of float [*shape], the last displacement before it was
      projected.
    shrink: a tree of one over the lengths of that displacement's rows, with
      axes of length 1 where rows extend.
    inner: the state of the wrapped optimizer.
  """

  count: Any  # an array; `tuple.count` has another type
  anchor: PyTree
  radius: PyTree
  m: PyTree
  v: PyTree
  displaced: PyTree
  shrink: PyTree
  inner: PyTree


def ftp(
  inner: optax.GradientTransformation,
  anchor: PyTree = None,
  *,
  k: float | int = 1.0,
  mu: float | int = 1e-2,
  hyper_b1: float | int = 0.9,
  hyper_b2: float | int = 0.999,
  hyper_eps: float | int = 1e-8,
  gamma_init: float | int = 1e-8,
  norm: str = "mars",
  row_axes: anchors.RowAxes | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Projects each step into a ball around the anchor whose radius is learned.

  Fast Trainable Projection (Tian et al. 2023, NeurIPS, algorithm 1; details
  read in the authors' code, and the same numbers as it in float64). With the
  displacement c = theta + u - theta_0 that the inner optimizer proposes, each
  row r of length n_r is scaled by min(1, gamma / n_r). gamma, one number a
  tensor, follows Adam on the gradient of the loss in it, which is known from
  this step's gradient and the last step's displacement: nothing is computed
  twice.

  It wraps the *whole* optimizer, learning rate and decay included, and must be
  the last: nothing may rescale its updates. The first step moves weights by
  1e-8 at most. Memory: the inner optimizer's, and twice the parameters.

  Args:
    inner: the optimizer that proposes a step.
    anchor: theta_0, a tree like the parameters, or a function of them that
      makes one (`optax.tree.zeros_like`); None: those that `init` sees.
    k: in [0, 1], scales a gradient that shrinks the ball; 1 keeps the weights
      closest to the anchor, at 0 no gradient shrinks the ball.
    mu: the learning rate of the radii, >= 0.
    hyper_b1: the decay rate of the radii's first moment, in [0, 1).
    hyper_b2: the decay rate of their second moment, in [0, 1).
    hyper_eps: the epsilon of the radii's Adam, > 0.
    gamma_init: the first radius, > 0; inf: no ball, the steps are `inner`'s.
    norm: the length of a row: `mars`, the sum of absolute values, or `l2`.
    row_axes: `(path, leaf) -> axes` that a row extends over, or a tree of axes
      like the parameters; None: `anchor.default_axes`.

  Raises:
    ValueError: a value out of its range; in `init`, an anchor of another
      structure; in `update`, no params.
  """
  for name, value, most in (
    ("k", k, 1.0),
    ("mu", mu, math.inf),
    ("gamma_init", gamma_init, math.inf),
  ):
    anchors.check_range(name, value, 0.0, most)
  length = specs.lookup(NORMS, norm, "norm")
  adam = anchors.Adam(mu, hyper_b1, hyper_b2, hyper_eps)
  inner = optax.with_extra_args_support(inner)

  def init(params: PyTree) -> FtpState:
    fixed = anchors.start(anchor, params)
    totals = anchors.row_sums(row_axes, fixed)
    return FtpState(
      count=jnp.int32(0),
      anchor=fixed,
      radius=anchors.scalars(fixed, gamma_init),
      m=anchors.scalars(fixed, 0),
      v=anchors.scalars(fixed, 0),
      displaced=optax.tree.zeros_like(fixed),
      shrink=jax.tree.map(lambda x, total: 0 * total(x), fixed, totals),
      inner=inner.init(params),
    )

  def update(
    updates: PyTree, state: FtpState, params: PyTree = None, **extra: Any
  ) -> tuple[PyTree, FtpState]:
    anchors.check(params, "ftp")
    grads = updates
    updates, inner_state = inner.update(updates, state.inner, params, **extra)
    t = optax.safe_increment(state.count)
    project = functools.partial(_project, length, adam, k, t)
    totals = anchors.row_sums(row_axes, state.anchor)
    # All of the state but the count and the inner optimizer's.
    out = jax.tree.map(project, grads, updates, params, *state[1:-1], totals)
    steps, radius, m, v, displaced, shrink = anchors.transposed(out, params, 6)
    return steps, FtpState(
      t, state.anchor, radius, m, v, displaced, shrink, inner_state
    )

  return optax.GradientTransformationExtraArgs(init, update)


def _project(
  length: Length,
  adam: anchors.Adam,
  k: float | int,
  t: Int[Array, ""],
  g: jax.Array,
  u: jax.Array,
  theta: jax.Array,
  fixed: jax.Array,
  radius: Float[Array, ""],
  m: Float[Array, ""],
  v: Float[Array, ""],
  displaced: jax.Array,
  shrink: jax.Array,
  total: anchors.RowSum,
) -> tuple[jax.Array, ...]:
  """Projects a tensor's step into its ball.

  Returns:
    The step, and the new radius, m, v, displaced and shrink of `FtpState`.
  """
  here = theta.astype(fixed.dtype)
  c = here - fixed + u.astype(fixed.dtype)
  n = length(c, total) + _TINY
  slope = (shrink * total(g.astype(fixed.dtype) * displaced)).sum()
  slope = jnp.where(slope > 0, k * slope, slope)
  moved, m, v = adam.step(radius, slope, m, v, t)
  held = jnp.clip(moved, _TINY, n.max())
  keep = (t == 1) | jnp.isinf(radius)
  radius = jnp.where(keep, radius, held)
  ratio = radius / n
  # Rows inside the ball take the step as it is, to the last bit.
  step = jnp.where(ratio >= 1, u, fixed + ratio * c - here)
  return step.astype(theta.dtype), radius, m, v, c, 1 / n
