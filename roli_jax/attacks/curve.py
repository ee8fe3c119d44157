"""The least distance of each image: a whole accuracy curve in one pass."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax

from roli_jax.attacks import base
from roli_jax.attacks.apgd import Apgd
from roli_jax.attacks.fab import Fab
from roli_jax.threat import ThreatModel
from roli_jax.types import Images, Keys, Labels, Logits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Curve(base.Attack):
  """FAB's distances, and then APGD at radii below them, each image its own.

  `evaluate.run` returns the distances, `Result.robust_at` the accuracy at any
  radius, which falls as the radius grows, since each image has one distance.

  Attributes:
    threat: the ball and the box.
    reach: the largest radius that is tried, in units of eps; 4 by default.
    num_steps: steps of a job of FAB and APGD, >= 3; 100 by default.
    num_rounds: how many radii APGD tries, >= 0; 7 by default.
    first_step: how far the first radius tried lies below the distance that FAB
      found, as a share of it; 0.02 by default.
  """

  threat: ThreatModel
  reach: float = base.static(4.0)
  num_steps: int = base.static(100)
  num_rounds: int = base.static(7)
  first_step: float = base.static(0.02)
  name: ClassVar[str] = "curve"
  is_ensemble: ClassVar[bool] = True
  finds_distance: ClassVar[bool] = True

  @property
  def fab(self) -> Fab:
    """The attack that finds the first distance."""
    return Fab(self.threat, num_targets=9, num_steps=self.num_steps)

  @property
  def climbs(self) -> tuple[Apgd, Apgd]:
    """The attacks that try a smaller radius."""
    towards = Apgd(
      self.threat, num_targets=1, loss="dlr", num_steps=self.num_steps
    )
    return towards, Apgd(self.threat, num_steps=self.num_steps)

  @property
  def passes(self) -> tuple[int, int]:
    """Forward and backward passes that an image costs at most."""
    parts: tuple[base.Attack, ...] = (self.fab, *self.climbs * self.num_rounds)
    forward, backward = zip(*(part.passes for part in parts), strict=True)
    return sum(forward), sum(backward)

  def run_in(self, evaluation: Any) -> None:
    """Measures each image's distance in an `evaluate.engine.Evaluation`."""
    evaluation.curve(self)

  def __call__(
    self,
    logits_fn: Callable[..., Logits],
    images: Images,
    labels: Labels,
    keys: Keys,
    *,
    stochastic: bool = False,
  ) -> Images:
    """Returns the nearest misclassified image of FAB's, if it is within eps.

    Args:
      logits_fn: `images -> logits`, or `(images, key) -> logits`.
      images: the clean ones, within the box, [b, *image].
      labels: their classes, [b].
      keys: one random key for each image, [b].
      stochastic: whether `logits_fn` takes a key.
    """
    return self.fab(logits_fn, images, labels, keys, stochastic=stochastic)
