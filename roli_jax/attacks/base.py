"""What an attack is, to those who call one."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import losses, trees
from roli_jax.threat import ThreatModel
from roli_jax.types import (
  Array,
  Bool,
  Float,
  Images,
  Keys,
  Labels,
  Logits,
  LogitsFn,
)

T = TypeVar("T")


def static(default: Any) -> Any:
  """A dataclass field of an attack's structure: another value recompiles."""
  return dataclasses.field(default=default, metadata=trees.STATIC)


def target_field() -> Any:
  """The field `targeted`, which leaves the repr as it was before there was one.

  An evaluation's progress on disk is known by that repr; it keeps this beside.
  """
  return dataclasses.field(default=False, repr=False, metadata=trees.STATIC)


def where(rows: Bool[Array, " b"], yes: T, no: T) -> T:
  """The rows of `yes` where the mask is true, and those of `no` elsewhere.

  Args:
    rows: the mask.
    yes: an array [b, ...], or a tree of such arrays.
    no: the same shapes and structure.
  """
  return jax.tree.map(lambda a, b: jnp.where(at_pixels(rows, a), a, b), yes, no)


def at_pixels(
  rows: Bool[Array, " b"], like: jax.Array | np.ndarray
) -> Bool[Array, "b ..."]:
  """The mask with as many axes as `like` has, so that the two broadcast."""
  return rows.reshape(-1, *(1,) * (like.ndim - 1))


def finite(grads: Float[Array, "*any"]) -> Float[Array, "*any"]:
  """Replaces values that are not finite by 0.

  They give no direction. A single NaN would otherwise stop an attack, and make
  the model look more robust than it is.
  """
  return jnp.where(jnp.isfinite(grads), grads, 0)


if TYPE_CHECKING:
  _answer = property
else:

  class _answer:
    """A property that objects have and classes lack.

    `dataclasses` takes a class attribute for the default of a field of the same
    name. A plain property would thus become the default of a subclass's field.
    """

    def __init__(self, get: Callable[[Any], Any]):
      self._get = get

    def __get__(self, attack: Any, owner: type) -> Any:
      if attack is None:
        raise AttributeError(self._get.__name__)
      return self._get(attack)


class Attack:
  """The base of all attacks, which are frozen dataclasses and pytrees.

  The `repr` of an attack shows all of its settings. A subclass declares the
  field `threat` and defines `name`, `passes` and `__call__`; the other
  attributes have defaults. `stop` and the attributes after it tell an
  evaluation how to run the attack and how to judge the images it returns.

  Attributes:
    threat: the ball and the box that bound the attack; a field.
    name: the name in result rows.
    num_steps: gradient steps of one restart, >= 0; 1 by default.
    num_restarts: independent starts, >= 1, of which each image keeps the worst;
      1 by default.
    passes: forward and backward passes that one image costs at most.
    loss: the surrogate that it raises, a name in `losses.SURROGATES`, or "";
      `kl` takes the clean logits in place of labels.
    parts: the attacks that are run in its place, each on the images that the
      ones before it did not break.
    targeted: whether labels are targets: classes to reach, and not to leave. A
      field of those attacks that can.
    stop: whether an image that is misclassified is attacked no further.
    is_search: whether it is run step by step, as a `Search`, or by one call.
    is_ensemble: whether it runs several attacks.
    is_long: whether a run stores its progress and the images found, so that a
      killed evaluation can resume.
    finds_distance: whether it minimises each image's distance. A point beyond
      eps then gives a distance; it is neither a break nor an error.
  """

  threat: ThreatModel
  targeted: bool = False
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
    """Returns the same attack at `ratio` times the radius, `ratio` >= 0."""
    threat = dataclasses.replace(self.threat, eps=self.threat.eps * ratio)
    return dataclasses.replace(cast(Any, self), threat=threat)

  def for_training(self, surrogate: str) -> "Attack":
    """Returns the attack that a training step runs.

    Args:
      surrogate: the loss that the training objective asks for, a name in
        `losses.SURROGATES`; an attack that can't raise it keeps its own.

    Returns:
      An attack that returns each image's point of highest loss. (In evaluation
      an attack may stop at the first misclassified image.)

    Raises:
      ValueError: the attack, or its settings, find no such point.
    """
    del surrogate
    raise ValueError(
      f"{self.name} can't train: it looks for misclassified images, and"
      " training wants each image's point of highest loss; take pgd, fgsm,"
      " apgd_ce or apgd_dlr"
    )

  def succeeds(self, logits: Logits, labels: Labels) -> Bool[Array, " b"]:
    """Returns who is misclassified; or, if it is targeted, at their target."""
    at_label = losses.correct(logits, labels)
    return at_label if self.targeted else ~at_label

  def run_in(self, evaluation: Any) -> None:
    """Runs `parts` on the images that still stand.

    Args:
      evaluation: an `evaluate.engine.Evaluation`.
    """
    for part in self.parts:
      evaluation.attack(part)

  def __call__(
    self,
    logits_fn: LogitsFn,
    images: Images,
    labels: Labels | Logits,
    keys: Keys,
  ) -> Images:
    """Perturbs images within the threat model, to have them misclassified.

    Pure and traceable. The caller judges the result by a forward pass of its
    own. Each image's result depends on that image, its label and its key, not
    on the rest of the batch.

    Args:
      logits_fn: `images -> logits`.
      images: the clean ones, within the box, [b, *image].
      labels: their classes, [b], or targets, if it is targeted; clean logits
        [b, k] for the loss `kl`.
      keys: one random key for each image, [b].

    Returns:
      Images of the same shape.
    """
    raise NotImplementedError
