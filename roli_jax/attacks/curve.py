"""The least distance of each image: a whole accuracy curve in one pass."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax

from roli_jax.attacks import base, search
from roli_jax.attacks.apgd import Apgd
from roli_jax.attacks.fab import Fab
from roli_jax.threat import ThreatModel
from roli_jax.types import Images, Keys, Labels, Logits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Curve(base.Attack):
  """FAB's distances, and then APGD at radii below them, each image its own.

  `evaluate.run` gives the distances, `Result.robust_at` the accuracy at any
  radius: nested and monotone, since each image has one distance.

  Attributes:
    threat: the ball and the box.
    reach: the largest radius that is looked at, in units of eps.
    num_steps: of FAB and APGD.
    num_rounds: of radii that are tried.
    first_step: from the distance found to the first radius tried, as a share.
  """

  threat: ThreatModel
  reach: float = search.static(4.0)
  num_steps: int = search.static(100)
  num_rounds: int = search.static(7)
  first_step: float = search.static(0.02)
  name: ClassVar[str] = "curve"
  is_ensemble: ClassVar[bool] = True
  finds_distance: ClassVar[bool] = True

  @property
  def fab(self) -> Fab:
    """What finds a distance to begin with."""
    return Fab(self.threat, num_targets=9, num_steps=self.num_steps)

  @property
  def climbs(self) -> tuple[Apgd, Apgd]:
    """What tries a smaller radius."""
    towards = Apgd(
      self.threat, num_targets=1, loss="dlr", num_steps=self.num_steps
    )
    return towards, Apgd(self.threat, num_steps=self.num_steps)

  @property
  def passes(self) -> tuple[int, int]:
    """Forward and backward passes that an image costs at most."""
    parts = (self.fab, *self.climbs * self.num_rounds)
    forward, backward = zip(*(part.passes for part in parts), strict=True)
    return sum(forward), sum(backward)

  def run_in(self, evaluation: Any) -> None:
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
    """The nearest misclassified image that FAB finds, if it is within eps."""
    return self.fab(logits_fn, images, labels, keys, stochastic=stochastic)
