"""The training step that the suites time: its batch and its state."""

from collections.abc import Callable
from typing import Any

import numpy as np

from roli_jax import (
  attacks,
  convert,
  keys,
  losses,
  models,
  optim,
  peft,
  state,
  step,
)
from roli_jax.optim import schedules
from roli_jax.threat import ThreatModel
from roli_jax.types import Variables

NUM_STEPS = 7  # of PGD in a training step, as in RoLI
EPS = 0.1  # its radius, in Linf

Batch = dict[str, np.ndarray]
# `(state, batch, key) -> (state, counts)`
TrainStep = Callable[..., tuple[state.TrainState, Any]]


def shipped() -> tuple[models.Model, Variables]:
  """The robust network that comes with the package, and its variables."""
  bundle = convert.load(convert.find("glyph_vit", "robust"))
  return bundle.model, (bundle.params, bundle.stats)


def random_batch(model: models.Model, size: int) -> Batch:
  """Random images of the model's size, uint8, their labels and indices."""
  shape = (size, model.image_size, model.image_size, model.channels)
  rng = np.random.default_rng(0)
  return {
    "image": rng.integers(0, 256, shape, dtype=np.uint8),
    "label": rng.integers(0, model.num_classes, size, dtype=np.int32),
    "index": np.arange(size, dtype=np.uint32),
  }


def attack(loss: str = "ce", eps: float = EPS) -> attacks.Attack:
  """The step's PGD, which raises this surrogate within this radius."""
  threat = ThreatModel("linf", eps)
  return attacks.build("pgd", threat, num_steps=NUM_STEPS, loss=loss)


def build_step(
  model: models.Model,
  method: peft.Method,
  *,
  loss: str = "at",
  anchor: str = "none",
  gamma: float = 0.0,
  num_parts: int = 1,
) -> tuple[TrainStep, state.TrainState]:
  """A step of adversarial training with AdamW, and the state before it.

  Args:
    model: the classifier, without the method's modules.
    method: chooses the leaves that train.
    loss: a name in `losses.OBJECTIVES`.
    anchor: a name in `optim.ANCHORS`; it holds the head too.
    gamma: the strength of the weights' perturbation, >= 0, see
      `step.WeightAttack`.
    num_parts: the batch is attacked in so many parts.

  Returns:
    The step, which is not jitted and donates nothing, and a random state.
  """
  model = method.apply_to(model)
  params, stats = model.init(keys.root(0))
  objective = losses.OBJECTIVES[loss]()
  near = {"anchor": {"name": anchor}, "head": "anchor_at_probe"}
  shape = schedules.warmup(100, 0.1, "cosine")
  tx = optim.build({"name": "adamw", **near}, method.labels(params), shape)
  pgd, radius = attack(objective.surrogate), schedules.ramp(100)
  awp = step.WeightAttack(gamma)
  train_step = step.make_train_step(
    model, method, objective, pgd, radius, tx, awp=awp, num_parts=num_parts
  )
  return train_step, state.create(params, stats, method.trains(params), tx)
