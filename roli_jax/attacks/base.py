"""What an attack is, to those who call one."""

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, cast

import jax.numpy as jnp

from roli_jax.threat import ThreatModel
from roli_jax.types import Array, Float, Images, Keys, Labels, Logits, LogitsFn


def finite(grads: Float[Array, "*any"]) -> Float[Array, "*any"]:
  """Gradients with 0 in place of what is not finite, which is no direction.

  A single NaN would otherwise stop an attack, and flatter the model.
  """
  return jnp.where(jnp.isfinite(grads), grads, 0)


if TYPE_CHECKING:
  _answer = property
else:

  class _answer:
    """A property of objects only.

    A field of a subclass would take a plain property for its default.
    """

    def __init__(self, get):
      self._get = get

    def __get__(self, attack, owner):
      if attack is None:
        raise AttributeError(self._get.__name__)
      return self._get(attack)


class Attack:
  """The base of all attacks, which are frozen dataclasses and pytrees.

  The `repr` of an attack says all of its settings. A class of its own declares
  the field `threat`, and gives `name`, `passes` and `__call__`; the rest has
  defaults. `stop` and what follows it say how an evaluation runs the attack
  and judges what it finds.

  Attributes:
    threat: where the attack may go; a field.
    name: as it stands in rows.
    num_steps: gradient steps of one restart, >= 0.
    num_restarts: independent starts, >= 1, of which each image keeps the worst.
    passes: forward and backward passes that one image costs at most.
    loss: the surrogate that it raises, a name in `losses.SURROGATES`, or "";
      `kl` takes the clean logits in place of labels.
    parts: the attacks that are run in its place, each on what the ones before
      it left standing.
    stop: whether an image that is misclassified is attacked no further.
    is_search: whether it is run step by step, as a `Search`, or by one call.
    is_ensemble: whether it is several attacks.
    is_long: whether a run keeps its progress, for a killed evaluation to go on,
      and all that it found.
    finds_distance: whether it looks for each image's least distance: a point
      beyond eps is then a distance, neither a break nor a mistake.
  """

  threat: ThreatModel
  stop: bool = True
  is_search: ClassVar[bool] = False
  is_ensemble: ClassVar[bool] = False
  is_long: ClassVar[bool] = True
  finds_distance: ClassVar[bool] = False

  @_answer
  def name(self) -> str:
    raise NotImplementedError

  @_answer
  def num_steps(self) -> Any:
    return 1

  @_answer
  def num_restarts(self) -> Any:
    return 1

  @_answer
  def passes(self) -> tuple[int, int]:
    raise NotImplementedError

  @_answer
  def loss(self) -> str:
    return ""

  @_answer
  def parts(self) -> tuple["Attack", ...]:
    return (self,)

  def scaled(self, ratio: float | Float[Array, ""]) -> Any:
    """The same attack at `ratio` times the radius."""
    threat = dataclasses.replace(self.threat, eps=self.threat.eps * ratio)
    return dataclasses.replace(cast(Any, self), threat=threat)

  def for_training(self, surrogate: str) -> "Attack":
    """The attack as a training step makes it.

    Args:
      surrogate: the loss that the training's objective would have raised;
        attacks that can raise it do.

    Returns:
      An attack that returns each image's point of highest loss. (Others look
      for misclassified images, and stop where there is one.)

    Raises:
      ValueError: the attack, or one of such settings, finds no such point.
    """
    del surrogate
    raise ValueError(
      f"{self.name} can't train: it looks for misclassified images, and"
      " training wants each image's point of highest loss; take pgd, fgsm,"
      " apgd_ce or apgd_dlr"
    )

  def run_in(self, evaluation: Any) -> None:
    """Attacks what still stands in an `evaluate.engine.Evaluation`."""
    for part in self.parts:
      evaluation.attack(part)

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
    raise NotImplementedError
