"""Criteria: their inputs and outputs, and objectives as criteria."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

from roli_jax import losses, trees
from roli_jax.models import Model
from roli_jax.types import (
  Array,
  Float,
  Images,
  Key,
  Labels,
  Logits,
  Params,
  PyTree,
)


@trees.tree_class
class Batch:
  """The inputs of a criterion in one step.

  Attributes:
    clean: float [b, h, w, c] in [0, 1], the clean images.
    adv: float [b, h, w, c], the adversarial images; the clean ones where no
      image is attacked.
    labels: int [b], their classes.
    indices: int [b], the numbers of the images in the training set.
    key: a key [], for the criterion's draws in this step.
    dropout: a key [], for dropout in this step.
  """

  clean: Images
  adv: Images
  labels: Labels
  indices: Any
  key: Key[Array, ""]
  dropout: Key[Array, ""]


@trees.tree_class
class LossOutput:
  """The outputs of a criterion for one batch.

  Attributes:
    values: float [b], each image's loss, whose mean is lowered.
    logits: float [b, k], of the images that were trained on, for counts.
    stats: the tree of running statistics after the batch.
    memory: the criterion's tree of arrays after the batch.
  """

  values: Float[Array, " b"]
  logits: Logits
  stats: PyTree
  memory: PyTree


@dataclasses.dataclass(frozen=True)
class Forward:
  """A forward pass in training: `(params, stats, images) -> (logits, stats)`.

  Attributes:
    model: the classifier.
    train: whether it is in training mode.
    key: a key [], for dropout.
  """

  model: Model
  train: bool
  key: Key[Array, ""]

  def __call__(
    self, params: Params, stats: PyTree, images: Images
  ) -> tuple[Logits, PyTree]:
    return self.model(params, stats, images, train=self.train, key=self.key)


@runtime_checkable
class Criterion(Protocol):
  """A loss that training lowers; a frozen dataclass.

  Attributes:
    surrogate: the name of the loss that the inner attack raises by default.
    adversarial: the share of a batch that is attacked: 0, 0.5 or 1.
    needs_clean: whether clean images go through the model as well.
  """

  @property
  def surrogate(self) -> str: ...

  @property
  def adversarial(self) -> float: ...

  @property
  def needs_clean(self) -> bool: ...

  def init_memory(self, params: Params, stats: PyTree) -> PyTree:
    """Returns the tree that it keeps from step to step, before the first.

    Args:
      params: the parameters at the start of the stage.
      stats: the running statistics at the start of the stage.

    Raises:
      ValueError: it can't train such a model.
    """
    ...

  def __call__(
    self,
    forward: Forward,
    params: Params,
    stats: PyTree,
    memory: PyTree,
    batch: Batch,
  ) -> LossOutput:
    """Computes each image's loss.

    Args:
      forward: the forward pass of training.
      params: the parameters.
      stats: the running statistics before the batch.
      memory: the tree of `init_memory`, or of the step before.
      batch: the images, their labels and the step's keys.
    """
    ...


@dataclasses.dataclass(frozen=True)
class OnLogits:
  """An objective, which is a function of logits, as a criterion.

  Attributes:
    objective: one of `losses.OBJECTIVES`.
  """

  objective: losses.Objective

  @property
  def surrogate(self) -> str:
    return self.objective.surrogate

  @property
  def adversarial(self) -> float:
    return self.objective.adversarial

  @property
  def needs_clean(self) -> bool:
    return self.objective.needs_clean

  def init_memory(self, params: Params, stats: PyTree) -> PyTree:
    del params, stats
    return {}

  def __call__(
    self,
    forward: Forward,
    params: Params,
    stats: PyTree,
    memory: PyTree,
    batch: Batch,
  ) -> LossOutput:
    adv, moved = forward(params, stats, batch.adv)
    clean = None
    if self.needs_clean:
      clean, moved = forward(params, moved, batch.clean)
    values = self.objective(clean=clean, adv=adv, labels=batch.labels)
    return LossOutput(values=values, logits=adv, stats=moved, memory=memory)


def of(objective: losses.Objective | Criterion) -> Criterion:
  """Returns an objective as a criterion, and a criterion unchanged."""
  return objective if isinstance(objective, Criterion) else OnLogits(objective)
