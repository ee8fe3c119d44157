"""What a criterion is given, what it says, and how an objective is one."""

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
  """A batch as a step sees it.

  Attributes:
    clean: the images.
    adv: what the attack made of them; the clean ones where nothing is attacked.
    labels: their classes.
    indices: who each image is.
    key: what the criterion draws from in this step.
    dropout: what dropout draws from in this step.
  """

  clean: Images
  adv: Images
  labels: Labels
  indices: Any
  key: Key[Array, ""]
  dropout: Key[Array, ""]


@trees.tree_class
class LossOutput:
  """What a criterion says of a batch.

  Attributes:
    values: each image's loss, lowered in the mean.
    logits: the logits of the images that were trained on, for counts.
    stats: running statistics after the batch.
    memory: the criterion's, after the batch.
  """

  values: Float[Array, "b"]
  logits: Logits
  stats: PyTree
  memory: PyTree


@dataclasses.dataclass(frozen=True)
class Forward:
  """A pass in training: `(params, stats, images) -> (logits, stats)`.

  Attributes:
    model: the classifier.
    train: whether it is in training mode.
    key: what dropout draws from.
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
  """What training lowers; a frozen dataclass.

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
    """What it keeps from step to step, from the model before the first.

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
  ) -> LossOutput: ...


@dataclasses.dataclass(frozen=True)
class OnLogits:
  """An objective, which logits decide.

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
  """The criterion that an objective is; a criterion is its own."""
  return objective if isinstance(objective, Criterion) else OnLogits(objective)
