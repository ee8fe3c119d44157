"""A criterion plus a penalty."""

import dataclasses
from typing import Protocol, runtime_checkable

from roli_jax.objectives.base import Batch, Criterion, Forward, LossOutput
from roli_jax.types import Array, Float, Params, PyTree


@runtime_checkable
class Penalty(Protocol):
  """A term that is added to each image's loss; a frozen dataclass.

  Attributes:
    needs_attack: whether it uses adversarial images.
    needs_clean: whether clean images go through the model.
    needs_start: whether it compares with the model at the stage's start, which
      is meaningless under a random head.
  """

  @property
  def needs_attack(self) -> bool: ...

  @property
  def needs_clean(self) -> bool: ...

  @property
  def needs_start(self) -> bool: ...

  def init_memory(self, params: Params, stats: PyTree) -> PyTree:
    """See `Criterion.init_memory`."""
    ...

  def __call__(
    self,
    forward: Forward,
    params: Params,
    stats: PyTree,
    memory: PyTree,
    batch: Batch,
  ) -> tuple[Float[Array, " b"], PyTree]:
    """Returns each image's weighted penalty, and the memory after the batch."""
    ...


@dataclasses.dataclass(frozen=True)
class Penalised:
  """A criterion plus a penalty, which moves no running statistics.

  Attributes:
    base: the criterion.
    penalty: the term that is added.

  Raises:
    ValueError: a penalty on adversarial images where none are made.
  """

  base: Criterion
  penalty: Penalty

  def __post_init__(self):
    if self.penalty.needs_attack and not self.base.adversarial:
      raise ValueError(
        f"{self.penalty} is about adversarial images, and a loss that attacks"
        " none makes none; choose others, or another loss"
      )

  @property
  def surrogate(self) -> str:
    return self.base.surrogate

  @property
  def adversarial(self) -> float:
    return self.base.adversarial

  @property
  def needs_clean(self) -> bool:
    return self.base.needs_clean or self.penalty.needs_clean

  def init_memory(self, params: Params, stats: PyTree) -> PyTree:
    return {
      "base": self.base.init_memory(params, stats),
      "penalty": self.penalty.init_memory(params, stats),
    }

  def __call__(
    self,
    forward: Forward,
    params: Params,
    stats: PyTree,
    memory: PyTree,
    batch: Batch,
  ) -> LossOutput:
    out = self.base(forward, params, stats, memory["base"], batch)
    added, kept = self.penalty(forward, params, stats, memory["penalty"], batch)
    return dataclasses.replace(
      out,
      values=out.values + added,
      memory={"base": out.memory, "penalty": kept},
    )
