"""Directional Gradient Projection."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from roli_jax import specs
from roli_jax.optim import anchor as anchors

_GUARD = 1e-12  # of the norms that are divided by

# Whether to project, from <g, theta - theta_0>.
WHEN = {"conflict": lambda x: x < 0, "agreement": lambda x: x > 0}


class DigrapState(NamedTuple):
  """Attributes:

  count: steps taken.
  anchor: the pretrained weights.
  omega: of each tensor, the share that is projected away.
  m: first moment of its gradient.
  v: second moment.
  projected: the last gradient's part along the displacement.
  """

  count: Any
  anchor: Any
  omega: Any
  m: Any
  v: Any
  projected: Any


def digrap(
  anchor: Any = None,
  *,
  mu: float | int = 1e-2,
  hyper_b1: float | int = 0.9,
  hyper_b2: float | int = 0.999,
  omega_max: float | int = 1.0,
  normalize: str = "tensor",
  project_when: str = "conflict",
  row_axes: anchors.RowAxes | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Takes from the gradient a learned share of what leads off the anchor.

  Directional Gradient Projection (Huang et al. 2025, ICLR). With d = theta -
  theta_0, p = <g, d> / (|d|^2 + 1e-8) d is the gradient's part along the
  displacement. Where descent leads away (<g, d> < 0) the gradient becomes
  g - omega p. omega, one number a tensor, starts at 0 and follows Adam on the
  cosine of g and the last step's p.

  It must be the *first* of a chain: `optax.chain(digrap(), optax.adamw(lr))`.

  The released code was not to be had: this follows the extracted text of
  algorithm 1 and the author's own pre-release optimizer, whose numbers it
  reaches to 2e-8 (its guards stand elsewhere). That text leaves the sign of the
  condition open; the figure's caption and the pre-release code say `conflict`.
  The cosine of the whole tensor is ours, the pre-release code's is `row`.

  Args:
    anchor: theta_0, as in `ftp`; zeros for what PEFT adds.
    mu: the learning rate of omega, >= 0; the paper's is not known.
    hyper_b1: of its first moment.
    hyper_b2: of its second.
    omega_max: the largest omega, in [0, 1]; 0 leaves every gradient as it is.
    normalize: `tensor`: the cosine of whole tensors; `row`: the sum of those of
      rows.
    project_when: `conflict`, or `agreement`: where <g, d> > 0.
    row_axes: of `row`, as in `ftp`.

  Raises:
    ValueError: a value out of its range; in `init`, an anchor of another
      structure; in `update`, no params.
  """
  anchors.check_range("mu", mu, 0.0, math.inf)
  anchors.check_range("omega_max", omega_max, 0.0, 1.0)
  projects = specs.lookup(WHEN, project_when, "project_when")
  by_row = specs.lookup({"tensor": False, "row": True}, normalize, "normalize")
  adam = anchors.Adam(mu, hyper_b1, hyper_b2, 1e-8)

  def unit(x, total):
    length = jnp.sqrt(total(x**2) if by_row else (x**2).sum())
    return x / jnp.maximum(length, _GUARD)

  def init(params):
    fixed = anchors.start(anchor, params)
    zeros = [
      jax.tree.map(lambda x: jnp.zeros((), x.dtype), fixed) for _ in range(3)
    ]
    return DigrapState(
      jnp.zeros((), jnp.int32), fixed, *zeros,
      jax.tree.map(jnp.zeros_like, fixed),
    )  # fmt: skip

  def update(updates, state, params=None, **extra):
    del extra
    anchors.check(params, "digrap")
    t = optax.safe_increment(state.count)

    def project(g, theta, fixed, omega, m, v, projected, total):
      wide = g.astype(fixed.dtype)
      d = theta.astype(fixed.dtype) - fixed
      along = (wide * d).sum()
      p = along / ((d**2).sum() + 1e-8) * d
      slope = (unit(wide, total) * unit(projected, total)).sum()
      omega, m, v = adam.step(omega, slope, m, v, t)
      omega = jnp.clip(omega, 0, omega_max)
      g = jnp.where(projects(along), wide - omega * p, wide).astype(g.dtype)
      return g, omega, m, v, p

    out = jax.tree.map(
      project, updates, params, state.anchor, state.omega, state.m, state.v,
      state.projected, anchors.axes_of(row_axes, state.anchor),
    )  # fmt: skip
    grads, omega, m, v, p = anchors.transposed(out, params, 5)
    return grads, DigrapState(t, state.anchor, omega, m, v, p)

  return optax.GradientTransformationExtraArgs(init, update)
