"""Selective Projection Decay, and the decay that it selects from."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from roli_jax import specs
from roli_jax.optim import anchor as anchors
from roli_jax.types import PyTree

# From a displacement, one length for the tensor, or one for each row.
NORMS = {
  "fro": lambda x, total: jnp.sqrt((x**2).sum()),
  "mars": lambda x, total: total(jnp.abs(x)) + 1e-8,
}


class AnchoredState(NamedTuple):
  """The state of `spd` and `l2sp`.

  Attributes:
    anchor: a tree like the parameters in >= float32, the pretrained weights.
    inner: the state of the wrapped optimizer.
  """

  anchor: PyTree
  inner: PyTree


def spd(
  inner: optax.GradientTransformation,
  anchor: PyTree = None,
  *,
  lam: PyTree = 1.0,
  norm: str = "fro",
  row_axes: anchors.RowAxes | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Decays towards the anchor those tensors whose displacement doesn't pay.

  Selective Projection Decay (Tian et al. 2024, NeurIPS, algorithm 1; details
  read in the authors' code, and the same numbers as it in float64). A tensor
  is decayed in a step whose gradient g has <g, theta - theta_0> > 0, that is,
  where descent leads back: with d the displacement before the step and c after
  it, c loses lam * r of itself, r = (|c| - |d|) / |c| clipped to [0, 1]. At
  lam = 1 the tensor ends as far from the anchor as it was.

  It wraps the *whole* optimizer, whose own weight decay the authors have off,
  and must be the last. lam isn't multiplied by the learning rate. Above 1 it
  contracts below the old distance, and lam * r > 1 leads past the anchor.

  Args:
    inner: the optimizer that proposes a step.
    anchor: as in `ftp`; zeros for leaves that PEFT adds.
    lam: >= 0, a number, or a tree of them like the parameters; 0 is `inner`.
    norm: `fro`, one length a tensor; `mars`, that of each row, by sums of
      absolute values, as the authors' later code offers.
    row_axes: the axes that a row of the norm `mars` sums, as in `ftp`.

  Raises:
    ValueError: a negative lam, an unknown norm; in `init`, an anchor of
      another structure; in `update`, no params.
  """
  _check_strengths(lam)
  length = specs.lookup(NORMS, norm, "norm")
  inner = optax.with_extra_args_support(inner)

  def init(params: PyTree) -> AnchoredState:
    return AnchoredState(anchors.start(anchor, params), inner.init(params))

  def update(
    updates: PyTree, state: AnchoredState, params: PyTree = None, **extra: Any
  ) -> tuple[PyTree, AnchoredState]:
    anchors.check(params, "spd")
    grads = updates
    updates, inner_state = inner.update(updates, state.inner, params, **extra)

    def decay(
      g: jax.Array,
      u: jax.Array,
      theta: jax.Array,
      fixed: jax.Array,
      strength: float | int | jax.Array,
      total: anchors.RowSum,
    ) -> jax.Array:
      d = theta.astype(fixed.dtype) - fixed
      c = d + u.astype(fixed.dtype)
      before, after = length(d, total), length(c, total)
      apart = jnp.where(after > 0, after, 1)
      ratio = jnp.clip((after - before) / apart, 0, 1)
      leads_back = (g.astype(fixed.dtype) * d).sum() > 0
      lost = jnp.where(leads_back, strength * ratio, 0) * c
      return (u.astype(fixed.dtype) - lost).astype(theta.dtype)

    strengths = _each(lam, params)
    totals = anchors.row_sums(row_axes, state.anchor)
    steps = jax.tree.map(
      decay, grads, updates, params, state.anchor, strengths, totals
    )
    return steps, AnchoredState(state.anchor, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def l2sp(
  inner: optax.GradientTransformation,
  anchor: PyTree = None,
  *,
  lam: PyTree = 1e-2,
) -> optax.GradientTransformationExtraArgs:
  """Adds lam (theta - theta_0) to the gradient (Li et al. 2018, L2-SP, eq. 2).

  The gradient of lam / 2 |theta - theta_0|^2, which `inner` then sees: an
  adaptive optimizer rescales it with the rest.

  Args:
    inner: the optimizer that gets the sum.
    anchor: as in `ftp`.
    lam: >= 0, a number, or a tree of them like the parameters; 0 is `inner`.

  Raises:
    ValueError: as in `spd`.
  """
  _check_strengths(lam)
  inner = optax.with_extra_args_support(inner)

  def init(params: PyTree) -> AnchoredState:
    return AnchoredState(anchors.start(anchor, params), inner.init(params))

  def update(
    updates: PyTree, state: AnchoredState, params: PyTree = None, **extra: Any
  ) -> tuple[PyTree, AnchoredState]:
    anchors.check(params, "l2sp")

    def pull(
      g: jax.Array,
      theta: jax.Array,
      fixed: jax.Array,
      strength: float | int | jax.Array,
    ) -> jax.Array:
      back = strength * (theta.astype(fixed.dtype) - fixed)
      return (g.astype(fixed.dtype) + back).astype(g.dtype)

    grads = jax.tree.map(
      pull, updates, params, state.anchor, _each(lam, params)
    )
    updates, inner_state = inner.update(grads, state.inner, params, **extra)
    return updates, AnchoredState(state.anchor, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def _check_strengths(strengths: PyTree) -> None:
  for strength in jax.tree.leaves(strengths):
    anchors.check_range("lam", strength, 0.0, math.inf)


def _each(values: PyTree, params: PyTree) -> PyTree:
  """Returns a tree of numbers like params, from such a tree or one number."""
  if isinstance(values, int | float):
    return jax.tree.map(lambda _: values, params)
  return jax.tree.map(lambda _, value: value, params, values)
