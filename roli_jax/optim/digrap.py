"""Directional Gradient Projection."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from roli_jax import specs
from roli_jax.optim import anchor as anchors
from roli_jax.types import Array, Float, PyTree

_GUARD = 1e-12  # the least norm that is divided by

# Whether to project, from the inner product <g, theta - theta_0>.
WHEN = {"conflict": lambda x: x < 0, "agreement": lambda x: x > 0}


class DigrapState(NamedTuple):
  """The state of `digrap`; trees are like the parameters, in >= float32.

  Attributes:
    count: int32 [], steps taken.
    anchor: a tree of float [*shape], the pretrained weights.
    omega: a tree of float [], the share of the gradient's part along the
      displacement that is projected away.
    m: a tree of float [], the first moment of omega's gradient.
    v: a tree of float [], the second moment.
    projected: a tree of float [*shape], the last gradient's part along the
      displacement.
  """

  count: Any  # an array; `tuple.count` has another type
  anchor: PyTree
  omega: PyTree
  m: PyTree
  v: PyTree
  projected: PyTree


def digrap(
  anchor: PyTree = None,
  *,
  mu: float | int = 1e-2,
  hyper_b1: float | int = 0.9,
  hyper_b2: float | int = 0.999,
  omega_max: float | int = 1.0,
  normalize: str = "tensor",
  project_when: str = "conflict",
  row_axes: anchors.RowAxes | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Removes from the gradient a learned share of its part off the anchor.

  Directional Gradient Projection (Huang et al. 2025, ICLR). With d = theta -
  theta_0, p = <g, d> / (|d|^2 + 1e-8) d is the gradient's part along the
  displacement. Where descent leads away (<g, d> < 0) the gradient becomes
  g - omega p. omega, one number a tensor, starts at 0 and follows Adam on the
  cosine of g and the last step's p.

  It must be the *first* of a chain: `optax.chain(digrap(), optax.adamw(lr))`.

  No released code was found: this follows the extracted text of algorithm 1 and
  the author's own pre-release optimizer, whose numbers it reaches to 2e-8 (its
  guards are elsewhere). That text leaves the sign of the condition open; the
  figure's caption and the pre-release code use `conflict`. The cosine of the
  whole tensor is ours, the pre-release code uses `row`.

  Args:
    anchor: theta_0, as in `ftp`; zeros for leaves that PEFT adds.
    mu: the learning rate of omega, >= 0; the paper's is not known.
    hyper_b1: the decay rate of omega's first moment, in [0, 1).
    hyper_b2: the decay rate of its second moment, in [0, 1).
    omega_max: the largest omega, in [0, 1]; 0 leaves every gradient as it is.
    normalize: `tensor`: the cosine of whole tensors; `row`: the sum of the
      cosines of rows.
    project_when: `conflict`: where <g, d> < 0; `agreement`: where <g, d> > 0.
    row_axes: the axes of a row if `normalize` is `row`, as in `ftp`.

  Raises:
    ValueError: a value out of its range; in `init`, an anchor of another
      structure; in `update`, no params.
  """
  anchors.check_range("mu", mu, 0.0, math.inf)
  anchors.check_range("omega_max", omega_max, 0.0, 1.0)
  projects = specs.lookup(WHEN, project_when, "project_when")
  by_row = specs.lookup({"tensor": False, "row": True}, normalize, "normalize")
  adam = anchors.Adam(mu, hyper_b1, hyper_b2, 1e-8)

  def unit(x: jax.Array, total: anchors.RowSum) -> jax.Array:
    length = jnp.sqrt(total(x**2) if by_row else (x**2).sum())
    return x / jnp.maximum(length, _GUARD)

  def init(params: PyTree) -> DigrapState:
    fixed = anchors.start(anchor, params)
    omega, m, v = (anchors.scalars(fixed, 0) for _ in range(3))
    projected = optax.tree.zeros_like(fixed)
    return DigrapState(jnp.int32(0), fixed, omega, m, v, projected)

  def update(
    updates: PyTree, state: DigrapState, params: PyTree = None, **extra: Any
  ) -> tuple[PyTree, DigrapState]:
    del extra
    anchors.check(params, "digrap")
    t = optax.safe_increment(state.count)

    def project(
      g: jax.Array,
      theta: jax.Array,
      fixed: jax.Array,
      omega: Float[Array, ""],
      m: Float[Array, ""],
      v: Float[Array, ""],
      projected: jax.Array,
      total: anchors.RowSum,
    ) -> tuple[jax.Array, ...]:
      wide = g.astype(fixed.dtype)
      d = theta.astype(fixed.dtype) - fixed
      along = (wide * d).sum()
      p = along / ((d**2).sum() + 1e-8) * d
      slope = (unit(wide, total) * unit(projected, total)).sum()
      omega, m, v = adam.step(omega, slope, m, v, t)
      omega = jnp.clip(omega, 0, omega_max)
      g = jnp.where(projects(along), wide - omega * p, wide).astype(g.dtype)
      return g, omega, m, v, p

    totals = anchors.row_sums(row_axes, state.anchor)
    out = jax.tree.map(project, updates, params, *state[1:], totals)
    grads, omega, m, v, p = anchors.transposed(out, params, 5)
    return grads, DigrapState(t, state.anchor, omega, m, v, p)

  return optax.GradientTransformationExtraArgs(init, update)
