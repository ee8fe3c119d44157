"""What an attack is, to those who call one."""

import dataclasses
from typing import Any, Protocol, cast, runtime_checkable

import jax.numpy as jnp

from roli_jax.threat import ThreatModel
from roli_jax.types import Array, Float, Images, Keys, Labels, Logits, LogitsFn


def finite(grads: Float[Array, "*any"]) -> Float[Array, "*any"]:
  """Gradients with 0 in place of what is not finite, which is no direction.

  A single NaN would otherwise stop an attack, and flatter the model.
  """
  return jnp.where(jnp.isfinite(grads), grads, 0)


class Scaled:
  """A frozen dataclass whose only radius is its threat model's."""

  threat: ThreatModel

  def scaled(self, ratio: float | Float[Array, ""]) -> Any:
    """The same attack at `ratio` times the radius."""
    threat = dataclasses.replace(self.threat, eps=self.threat.eps * ratio)
    return dataclasses.replace(cast(Any, self), threat=threat)


@runtime_checkable
class Attack(Protocol):
  """A frozen dataclass and a pytree; its `repr` says all of its settings.

  Attributes:
    threat: where the attack may go.
    name: as it stands in rows.
    num_steps: gradient steps of one restart.
    num_restarts: independent starts, of which each image keeps the worst.
    passes: forward and backward passes that one image costs.
  """

  threat: ThreatModel

  @property
  def name(self) -> str: ...

  @property
  def num_steps(self) -> int: ...

  @property
  def num_restarts(self) -> int: ...

  @property
  def passes(self) -> tuple[int, int]: ...

  def scaled(self, ratio: float | Float[Array, ""]) -> "Attack":
    """The same attack at `ratio` times the radius and the step size."""
    ...

  def __call__(
    self,
    logits_fn: LogitsFn,
    images: Images,
    labels: Labels | Logits,
    keys: Keys,
  ) -> Images:
    """Images within the threat model, meant to be misclassified.

    Pure and traceable; whoever calls it judges the result by a forward pass of
    its own. Each image's result depends on that image, its label and its key,
    not on the rest of the batch.
    """
    ...


@runtime_checkable
class TrainingAttack(Attack, Protocol):
  """An attack that can return each image's point of highest loss.

  Others look for misclassified images, and stop where there is one.

  Attributes:
    loss: the surrogate that it raises, a name in `losses.SURROGATES`; `kl`
      takes the clean logits in place of labels.
  """

  @property
  def loss(self) -> str: ...

  def for_training(self, surrogate: str) -> "TrainingAttack":
    """The attack as a training step makes it.

    Args:
      surrogate: the loss that the training's objective would have raised;
        attacks that can raise it do.

    Raises:
      ValueError: with such settings it finds no point of highest loss.
    """
    ...
