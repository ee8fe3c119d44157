"""Optimizers over groups of leaves, as optax transformations."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from roli_jax import specs, trees
from roli_jax.optim import reference, schedules
from roli_jax.optim.digrap import digrap
from roli_jax.optim.ftp import ftp
from roli_jax.optim.spd import l2sp, spd
from roli_jax.types import PyTree

# The paths of leaves without weight decay: biases, but not the scales of norms,
# as in the RoLI reference.
NO_DECAY = (".*bias",)


def adamw(
  learning_rate: schedules.Schedule,
  decay: Callable[[PyTree], PyTree],
  weight_decay: float | int,
  b1: float | int = 0.9,
  b2: float | int = 0.999,
  eps: float | int = 1e-8,
  eps_style: str = "standard",
) -> optax.GradientTransformation:
  """AdamW (Loshchilov and Hutter 2019), or the RoLI reference's.

  Args:
    learning_rate: the rate by step.
    decay: from parameters to a tree of bools, which of them decay.
    weight_decay: >= 0.
    b1: the decay rate of the first moment, in [0, 1).
    b2: the decay rate of the second moment, in [0, 1).
    eps: added to the denominator, > 0.
    eps_style: `standard`; `reference`, where `reference.adamw` adds it.
  """
  styles = {"standard": None, "reference": reference.adamw}
  other = specs.lookup(styles, eps_style, "eps_style")
  if other:
    return other(learning_rate, decay, weight_decay, b1, b2, eps)
  return optax.adamw(
    learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=decay
  )


def sgd(
  learning_rate: schedules.Schedule,
  decay: Callable[[PyTree], PyTree],
  weight_decay: float | int,
  momentum: float | int = 0.9,
) -> optax.GradientTransformation:
  """SGD with momentum and L2 regularisation, as in PyTorch."""
  return optax.chain(
    optax.add_decayed_weights(weight_decay, decay),
    optax.sgd(learning_rate, momentum),
  )


def muon(
  learning_rate: schedules.Schedule,
  decay: Callable[[PyTree], PyTree],
  weight_decay: float | int,
  beta: float | int = 0.95,
) -> optax.GradientTransformation:
  """Muon (Jordan 2024) on matrices, Adam, undecayed, on all other leaves.

  A matrix' update has the root mean square that AdamW's has (Liu et al. 2025,
  section 2.2), so that a rate for AdamW is one for Muon.

  Args:
    learning_rate: the rate by step.
    decay: from parameters to a tree of bools, which of them decay.
    weight_decay: >= 0.
    beta: the decay rate of the matrices' momentum, in [0, 1).
  """
  return optax.contrib.muon(
    learning_rate,
    beta=beta,
    weight_decay=weight_decay,
    weight_decay_mask=decay,
    consistent_rms=0.2,
  )


Maker = Callable[..., optax.GradientTransformation]
OPTIMIZERS: dict[str, Maker] = {"adamw": adamw, "sgd": sgd, "muon": muon}


def _digrap(
  inner: optax.GradientTransformation,
  anchor: PyTree = None,
  *,
  mu: float | int = 1e-2,
) -> optax.GradientTransformation:
  return optax.chain(digrap(anchor, mu=mu), inner)


# Wrappers of an optimizer that keep trained leaves near the pretrained ones.
ANCHORS: dict[str, Maker] = {
  "none": lambda inner, anchor: inner,
  "l2sp": l2sp,
  "ftp": ftp,
  "spd": spd,
  "digrap": _digrap,
}
HEADS = ("exclude", "anchor_at_probe")


def build(
  spec: Mapping[str, Any], labels: Any, shape: schedules.Schedule
) -> optax.GradientTransformationExtraArgs:
  """Builds the optimizer of a stage, over its trained leaves.

  The peak learning rate is data in the state (`at_rate`), not structure: one
  compiled step serves a whole grid of rates.

  Args:
    spec: `{"name": one of OPTIMIZERS, "weight_decay": 0.01, "no_decay":
      patterns of paths, "clip_norm": the largest norm of all trained leaves'
      gradient together (0: any), "multipliers": ((group, factor), ...) of the
      rate, "anchor": {"name": one of ANCHORS, ...its options}, "head": one of
      HEADS, ...the optimizer's options}`. An anchor holds a backbone to its
      weights at the start, the leaves that a method adds to zero, and the head
      to its start if it is `anchor_at_probe`.
    labels: a tree of the trained leaves' groups; None where a leaf is frozen.
    shape: the learning rate by step, as a share of its peak.

  Raises:
    ValueError: an unknown name or group, or a value out of its range.
  """
  optimizer_spec = specs.accepted_fields(
    OPTIMIZERS, {"weight_decay": 0.0, **spec}, "optimizer"
  )
  patterns = tuple(spec.get("no_decay", NO_DECAY))
  clip_norm = spec.get("clip_norm", 0.0)
  multipliers = dict(spec.get("multipliers", ()))
  groups = sorted(set(trees.paths(labels).values()))
  anchor_fields = spec.get("anchor") or {}
  given = {k: v for k, v in anchor_fields.items() if v is not None}
  anchor_spec = specs.accepted_fields(
    ANCHORS, {"name": "none", **given}, "anchor", blank=True
  )
  holds_head = specs.lookup(
    dict(zip(HEADS, (False, True), strict=True)),
    spec.get("head", HEADS[0]),
    "optim.head",
  )
  for name in ("weight_decay", "clip_norm"):
    if not spec.get(name, 0.0) >= 0:
      raise ValueError(f"{name} must be >= 0, got {spec[name]}")
  for group in multipliers:
    specs.lookup(dict.fromkeys(("backbone", "peft", "head")), group, "group")

  def hold(
    tx: optax.GradientTransformation, anchor: PyTree = None
  ) -> optax.GradientTransformation:
    return specs.build(ANCHORS, anchor_spec, "anchor", inner=tx, anchor=anchor)

  hold(optax.identity())  # checks the options even where no group is held

  def decay(params: PyTree) -> PyTree:
    rules = [(pattern, False) for pattern in patterns] + [(".*", True)]
    return trees.label(params, rules)

  def make(learning_rate: jax.Array | float) -> optax.GradientTransformation:
    def make_group(group: str) -> optax.GradientTransformation:
      factor = multipliers.get(group, 1.0)
      tx = specs.build(
        OPTIMIZERS,
        optimizer_spec,
        "optimizer",
        learning_rate=lambda step: factor * learning_rate * shape(step),
        decay=decay,
      )
      if group == "head" and not holds_head:
        return tx
      return hold(tx, optax.tree.zeros_like if group == "peft" else None)

    tx = optax.partition({group: make_group(group) for group in groups}, labels)
    if clip_norm:
      tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
    return tx

  return optax.inject_hyperparams(make)(learning_rate=0.0)


def at_rate(opt_state: Any, learning_rate: float) -> Any:
  """Returns the state of `build`'s optimizer at another peak learning rate."""
  peak = jnp.full_like(opt_state.hyperparams["learning_rate"], learning_rate)
  return opt_state._replace(hyperparams={"learning_rate": peak})
