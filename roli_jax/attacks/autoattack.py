"""AutoAttack: attacks in a row, each on images that the others did not break.

Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an
ensemble of diverse parameter-free attacks".
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from roli_jax import losses, specs
from roli_jax.attacks import base, search
from roli_jax.attacks.apgd import Apgd
from roli_jax.attacks.fab import Fab
from roli_jax.attacks.square import Square
from roli_jax.keys import fold
from roli_jax.threat import ThreatModel
from roli_jax.types import Images, Keys, Labels, Logits

VERSIONS = ("standard", "plus", "rand", "fast")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AutoAttack(base.Attack):
  """An ensemble of attacks; an image is robust if it is to each of them.

  Attributes:
    threat: the ball and the box.
    version: `standard`: APGD on cross-entropy, targeted APGD on DLR, targeted
      FAB, Square. `plus`: APGD on CE and DLR with 5 restarts, FAB with 5,
      Square, targeted APGD and FAB. `rand`, for randomised functions: APGD on
      CE and DLR with 20 draws a step. `fast`, which is *not* AutoAttack but
      ours: targeted APGD, then CE, at their full lengths; FAB towards
      boundaries whose linearisation is within 2 eps; Square on a tenth of the
      images, as a probe for masked gradients.
    num_steps: steps of a job of APGD and FAB, >= 3; 100 is the standard.
    num_queries: queries of Square after the first, >= 0; 5000 is the standard.
  """

  threat: ThreatModel
  version: str = base.static("standard")
  num_steps: int = base.static(100)
  num_queries: int = base.static(5000)
  is_ensemble: ClassVar[bool] = True

  def __post_init__(self):
    specs.lookup(dict.fromkeys(VERSIONS), self.version, "version")

  @property
  def name(self) -> str:
    """`autoattack` for the standard; `_custom` marks another budget."""
    version = "" if self.version == "standard" else f"_{self.version}"
    usual = (self.num_steps, self.num_queries) == (100, 5000)
    return f"autoattack{version}" + ("" if usual else "_custom")

  @property
  def parts(self) -> tuple[search.Search, ...]:
    """The attacks, in the order in which they run."""
    threat, num_steps = self.threat, self.num_steps
    apgd = functools.partial(Apgd, threat, num_steps=num_steps)
    fab = functools.partial(Fab, threat, num_steps=num_steps, stop=True)
    square = functools.partial(Square, threat, num_queries=self.num_queries)
    # In L1 the official code restarts more and aims at fewer classes.
    restarts, targets = (5, 5) if threat.norm == "l1" else (1, 9)
    ce = apgd(num_restarts=restarts)
    dlr_towards = apgd(num_targets=targets, loss="dlr")
    match self.version:
      case "plus":
        return (
          apgd(num_restarts=5),
          apgd(num_restarts=5, loss="dlr"),
          fab(num_restarts=5),
          square(),
          apgd(num_targets=9, loss="dlr"),
          fab(num_targets=9),
        )
      case "rand":
        return apgd(eot=20), apgd(eot=20, loss="dlr")
      case "fast":
        fab_near = fab(num_targets=9, reach=2.0)
        return dlr_towards, ce, fab_near, square(share=0.1)
    return ce, dlr_towards, fab(num_targets=9), square()

  @property
  def passes(self) -> tuple[int, int]:
    """Forward and backward passes that a robust image costs at most."""
    forward, backward = zip(*(part.passes for part in self.parts), strict=True)
    return sum(forward), sum(backward)

  def __call__(
    self,
    logits_fn: Callable[..., Logits],
    images: Images,
    labels: Labels,
    keys: Keys,
    *,
    stochastic: bool = False,
  ) -> Images:
    """Runs each attack on the images that the ones before it did not break.

    Args:
      logits_fn: `images -> logits`, or `(images, key) -> logits`.
      images: the clean ones, within the box, [b, *image].
      labels: their classes, [b].
      keys: one random key for each image, [b].
      stochastic: whether `logits_fn` takes a key.

    Returns:
      A misclassified image of the threat model where an attack found one, else
      the clean image.
    """
    classify = search.keyed(logits_fn, stochastic)
    images = jnp.asarray(images)
    adv: Images = images
    wrong = ~losses.correct(classify(images, keys), labels)
    for part in self.parts:
      part_keys = fold(keys, part.name)
      # Images that are misclassified already come back at once.
      found = part(logits_fn, adv, labels, part_keys, stochastic=stochastic)
      far = self.threat.distance(found, images)
      wins = ~wrong & ~losses.correct(classify(found, part_keys), labels)
      # A projection may end a few roundings of float32 beyond the radius.
      wins &= far <= self.threat.eps * (1 + 1e-5)
      adv = base.where(wins, found, adv)
      wrong |= wins
    return adv
