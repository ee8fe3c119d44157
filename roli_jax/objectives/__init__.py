"""Losses that a training step lowers, given the model and not logits alone.

An objective of `losses` sees clean and adversarial logits. A *criterion* runs
the model itself: twice, in another mode, or beside another model. `of` turns an
objective into a criterion. A *penalty* is added to any criterion.
"""

from collections.abc import Callable, Mapping
from typing import Any

from roli_jax import losses, specs
from roli_jax.objectives.autolora import AutoLora
from roli_jax.objectives.base import (
  Batch,
  Criterion,
  Forward,
  LossOutput,
  OnLogits,
  of,
)
from roli_jax.objectives.function_space import FunctionSpace
from roli_jax.objectives.m2_mix import M2Mix
from roli_jax.objectives.penalised import Penalised, Penalty
from roli_jax.objectives.twins import Twins

CRITERIA: dict[str, Any] = {"autolora": AutoLora, "twins": Twins}

LOSSES = {**losses.OBJECTIVES, **CRITERIA}

PENALTIES: dict[str, Any] = {
  "none": lambda: None,
  "function_space": FunctionSpace,
  "m2_mix": M2Mix,
}


def build(
  spec: Mapping[str, Any],
  penalty: Mapping[str, Any] | None = None,
  *,
  epoch_steps: int = 1,
) -> Criterion:
  """Builds the criterion of a config.

  Args:
    spec: `{"name": one of LOSSES, ...}`, with the options of all of them.
    penalty: `{"name": one of PENALTIES, ...}`, with the options of all of them;
      None: nothing is added, as by the name `none`.
    epoch_steps: the number of steps of an epoch, >= 1; 1 by default.

  Raises:
    ValueError: an unknown name, an option that it does not take, or one out of
      its range.
  """

  def make(
    registry: Mapping[str, Callable[..., Any]],
    options: Mapping[str, Any],
    what: str,
  ) -> Any:
    fields = specs.accepted_fields(registry, options, what, blank=True)
    own = specs.accepted_fields(
      registry, {**fields, "epoch_steps": epoch_steps}, what
    )
    return specs.build(registry, own, what)

  base = of(make(LOSSES, spec, "loss"))
  added = make(PENALTIES, penalty or {"name": "none"}, "penalty")
  return Penalised(base, added) if added else base


def needs_start(criterion: Criterion) -> bool:
  """Whether it is meaningless in a stage that starts from a random head."""
  return isinstance(criterion, Penalised) and criterion.penalty.needs_start


__all__ = [
  "CRITERIA",
  "LOSSES",
  "PENALTIES",
  "AutoLora",
  "Batch",
  "Criterion",
  "Forward",
  "FunctionSpace",
  "LossOutput",
  "M2Mix",
  "OnLogits",
  "Penalised",
  "Penalty",
  "Twins",
  "build",
  "needs_start",
  "of",
]
