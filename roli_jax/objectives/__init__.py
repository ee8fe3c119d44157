"""What a step lowers, given the model and not its logits alone.

An objective of `losses` sees clean and adversarial logits. A *criterion* runs
the model itself: twice, in another mode, beside another model. Each objective
is one, by `of`. A *penalty* adds to any of them.
"""

from collections.abc import Mapping
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

PENALTIES: dict[str, Any] = {"function_space": FunctionSpace, "m2_mix": M2Mix}


def build(
  spec: Mapping[str, Any],
  penalty: Mapping[str, Any] | None = None,
  *,
  epoch_steps: int = 1,
) -> Criterion:
  """The criterion that a config means.

  Args:
    spec: `{"name": one of LOSSES, ...}`, with the options of all of them.
    penalty: `{"name": one of PENALTIES, ...}` with the options of all of them;
      None, or `none`: nothing is added.
    epoch_steps: the steps that see every training image once.
  """

  def made(registry, spec, what):
    own = specs.accepted_fields(
      registry, {**spec, "epoch_steps": epoch_steps}, what
    )
    return specs.build(registry, own, what)

  base = of(made(LOSSES, spec, "loss"))
  if penalty is None or penalty["name"] == "none":
    return base
  return Penalised(base, made(PENALTIES, penalty, "penalty"))


def needs_start(criterion: Criterion) -> bool:
  """Whether it says nothing in a stage that starts from a random head."""
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
