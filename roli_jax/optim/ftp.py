"""Fast Trainable Projection."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from roli_jax import specs
from roli_jax.optim import anchor as anchors

_TINY = 1e-8  # of a row's length, and the least radius

# Of a row, from its entries and how they are summed.
NORMS = {
  "mars": lambda x, total: total(jnp.abs(x)),
  "l2": lambda x, total: jnp.sqrt(total(x**2)),
}


class FtpState(NamedTuple):
  """Each tensor's radius and what its gradient is made of.

  Attributes:
    count: steps taken.
    anchor: the pretrained weights.
    radius: of each tensor's ball, a scalar (gamma).
    m: first moment of the radius' gradient.
    v: second moment.
    displaced: the last displacement before it was projected.
    shrink: one over the lengths of its rows.
    inner: the state of the wrapped optimizer.
  """

  count: Any
  anchor: Any
  radius: Any
  m: Any
  v: Any
  displaced: Any
  shrink: Any
  inner: Any


def ftp(
  inner: optax.GradientTransformation,
  anchor: Any = None,
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
    inner: proposes a step.
    anchor: theta_0, a tree like the parameters, or a function of them that
      makes one (`optax.tree.zeros_like`); None: those that `init` sees.
    k: in [0, 1], how much of a gradient that shrinks the ball counts; 1 holds
      on the most, at 0 no gradient shrinks it.
    mu: the radius' learning rate, >= 0.
    hyper_b1: of its first moment.
    hyper_b2: of its second.
    hyper_eps: the epsilon of the radii's Adam, > 0.
    gamma_init: the first radius, > 0; inf: there is no ball, and it is `inner`.
    norm: of a row: `mars`, the sum of absolute values, or `l2`.
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

  def init(params):
    fixed = anchors.start(anchor, params)
    totals = anchors.axes_of(row_axes, fixed)

    def scalars(value):
      return jax.tree.map(lambda x: jnp.full((), value, x.dtype), fixed)

    return FtpState(
      count=jnp.zeros((), jnp.int32),
      anchor=fixed,
      radius=scalars(gamma_init),
      m=scalars(0.0),
      v=scalars(0.0),
      displaced=jax.tree.map(jnp.zeros_like, fixed),
      shrink=jax.tree.map(lambda x, total: 0 * total(x), fixed, totals),
      inner=inner.init(params),
    )

  def update(updates, state, params=None, **extra):
    anchors.check(params, "ftp")
    grads = updates
    updates, inner_state = inner.update(updates, state.inner, params, **extra)
    t = optax.safe_increment(state.count)

    out = jax.tree.map(
      functools.partial(_project, length, adam, k, t),
      grads, updates, params, state.anchor, state.radius, state.m, state.v,
      state.displaced, state.shrink, anchors.axes_of(row_axes, state.anchor),
    )  # fmt: skip
    steps, radius, m, v, displaced, shrink = anchors.transposed(out, params, 6)
    return steps, FtpState(
      count=t,
      anchor=state.anchor,
      radius=radius,
      m=m,
      v=v,
      displaced=displaced,
      shrink=shrink,
      inner=inner_state,
    )

  return optax.GradientTransformationExtraArgs(init, update)


def _project(
  length, adam, k, t, g, u, theta, fixed, radius, m, v, displaced, shrink, total
):
  """A tensor's step into its ball, and what the state keeps of it."""
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
