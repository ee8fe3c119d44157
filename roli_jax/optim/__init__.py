"""Optimizers over groups of leaves, as optax transformations."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax

from roli_jax import specs, trees
from roli_jax.optim import reference, schedules
from roli_jax.optim.digrap import digrap
from roli_jax.optim.ftp import ftp
from roli_jax.optim.spd import l2sp, spd

# Of a path, what exempts a leaf from weight decay: biases are, scales of
# norms are not, as in the RoLI reference.
NO_DECAY = (".*bias",)


def adamw(
  learning_rate,
  decay,
  weight_decay,
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  eps_style="standard",
):
  """AdamW (Loshchilov and Hutter 2019), or the RoLI reference's."""
  styles = {"standard": None, "reference": reference.adamw}
  other = specs.lookup(styles, eps_style, "eps_style")
  if other:
    return other(learning_rate, decay, weight_decay, b1, b2, eps)
  return optax.adamw(
    learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=decay
  )


def sgd(learning_rate, decay, weight_decay, momentum=0.9):
  """SGD with momentum and L2 regularisation, as in PyTorch."""
  return optax.chain(
    optax.add_decayed_weights(weight_decay, decay),
    optax.sgd(learning_rate, momentum),
  )


OPTIMIZERS: dict[str, Callable[..., Any]] = {"adamw": adamw, "sgd": sgd}


def _digrap(inner, anchor=None, *, mu=1e-2):
  return optax.chain(digrap(anchor, mu=mu), inner)


# What holds trained leaves to the pretrained ones, around an optimizer.
ANCHORS: dict[str, Callable[..., Any]] = {
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
  """The optimizer of a stage, over its trained leaves.

  The peak learning rate is data in the state (`at_rate`), not structure: one
  compiled step serves a whole grid of rates.

  Args:
    spec: `{"name": "adamw" or "sgd", "weight_decay": 0.01, "no_decay":
      patterns of paths, "clip_norm": the largest norm of all trained leaves'
      gradient together (0: any), "multipliers": ((group, factor), ...) of the
      rate, "anchor": {"name": one of ANCHORS, ...its own}, "head": one of
      HEADS, ...the optimizer's own}`. An anchor holds backbones to what they
      are at the start, what a method adds to zero, and the head to the start
      if it is `anchor_at_probe`.
    labels: the group of each trained leaf; None where a leaf is frozen.
    shape: the learning rate by step, as a share of its peak.
  """
  own = specs.accepted_fields(
    OPTIMIZERS, {"weight_decay": 0.0, **spec}, "optimizer"
  )
  patterns = tuple(spec.get("no_decay", NO_DECAY))
  clip_norm = spec.get("clip_norm", 0.0)
  multipliers = dict(spec.get("multipliers", ()))
  groups = sorted(set(trees.paths(labels).values()))
  near = specs.accepted_fields(ANCHORS, _given(spec.get("anchor")), "anchor")
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

  def hold(tx, at=None):
    return specs.build(ANCHORS, near, "anchor", inner=tx, anchor=at)

  hold(optax.identity())  # refuses what can't be meant, held or not

  def decay(params):
    rules = [(pattern, False) for pattern in patterns] + [(".*", True)]
    return trees.label(params, rules)

  def make(learning_rate):
    def of(group):
      factor = multipliers.get(group, 1.0)
      tx = specs.build(
        OPTIMIZERS,
        own,
        "optimizer",
        learning_rate=lambda step: factor * learning_rate * shape(step),
        decay=decay,
      )
      if group == "head" and not holds_head:
        return tx
      return hold(tx, optax.tree.zeros_like if group == "peft" else None)

    tx = optax.partition({group: of(group) for group in groups}, labels)
    if clip_norm:
      tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
    return tx

  return optax.inject_hyperparams(make)(learning_rate=0.0)


def _given(fields):
  """What is said of them; none without a name."""
  known = {k: v for k, v in (fields or {}).items() if v is not None}
  return {"name": "none", **known}


def at_rate(opt_state: Any, learning_rate: float) -> Any:
  """The same state at another peak learning rate."""
  peak = jnp.full_like(opt_state.hyperparams["learning_rate"], learning_rate)
  return opt_state._replace(hyperparams={"learning_rate": peak})
