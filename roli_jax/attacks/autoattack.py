"""AutoAttack: attacks in a row, each on what those before it left.

Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an
ensemble of diverse parameter-free attacks".
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from roli_jax import losses
from roli_jax.attacks import base, search
from roli_jax.attacks.apgd import Apgd
from roli_jax.attacks.fab import Fab
from roli_jax.attacks.square import Square
from roli_jax.keys import fold
from roli_jax.threat import ThreatModel
from roli_jax.types import Images, Keys, Labels, Logits


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
    num_steps: of APGD and FAB. Other than the default it is no standard.
    num_queries: of Square. Likewise.
  """

  threat: ThreatModel
  version: str = search.static("standard")
  num_steps: int = search.static(100)
  num_queries: int = search.static(5000)
  is_ensemble: ClassVar[bool] = True

  def __post_init__(self):
    if self.version not in _PARTS:
      raise ValueError(
        f"unknown version {self.version!r}; there are {sorted(_PARTS)}"
      )

  @property
  def name(self) -> str:
    """`autoattack` is standard; at another budget it is `custom`."""
    version = "" if self.version == "standard" else f"_{self.version}"
    usual = (self.num_steps, self.num_queries) == (100, 5000)
    return f"autoattack{version}" + ("" if usual else "_custom")

  @property
  def parts(self) -> tuple[search.Search, ...]:
    """The attacks, in their order."""
    return _PARTS[self.version](self)

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
    """What the attacks break, each from the clean image; the rest as it is."""
    classify = search.keyed(logits_fn, stochastic)
    images = jnp.asarray(images)
    adv = images
    wrong = ~losses.correct(classify(images, keys), labels)
    for part in self.parts:
      own = fold(keys, part.name)
      # Who is misclassified already comes back at once.
      found = part(logits_fn, adv, labels, own, stochastic=stochastic)
      far = self.threat.distance(found, images)
      wins = ~wrong & ~losses.correct(classify(found, own), labels)
      wins &= far <= self.threat.eps * (1 + 1e-5)
      adv = jnp.where(search.at_pixels(wins, adv), found, adv)
      wrong |= wins
    return adv


def _standard(attack: AutoAttack) -> tuple[search.Search, ...]:
  threat, n = attack.threat, attack.num_steps
  restarts, targets = (5, 5) if threat.norm == "l1" else (1, 9)
  return (
    Apgd(threat, num_restarts=restarts, num_steps=n),
    Apgd(threat, num_targets=targets, loss="dlr", num_steps=n),
    Fab(threat, num_targets=9, stop=True, num_steps=n),
    Square(threat, num_queries=attack.num_queries),
  )


def _plus(attack: AutoAttack) -> tuple[search.Search, ...]:
  threat, n = attack.threat, attack.num_steps
  return (
    Apgd(threat, num_restarts=5, num_steps=n),
    Apgd(threat, num_restarts=5, loss="dlr", num_steps=n),
    Fab(threat, num_restarts=5, stop=True, num_steps=n),
    Square(threat, num_queries=attack.num_queries),
    Apgd(threat, num_targets=9, loss="dlr", num_steps=n),
    Fab(threat, num_targets=9, stop=True, num_steps=n),
  )


def _rand(attack: AutoAttack) -> tuple[search.Search, ...]:
  threat, n = attack.threat, attack.num_steps
  return (
    Apgd(threat, eot=20, num_steps=n),
    Apgd(threat, eot=20, loss="dlr", num_steps=n),
  )


def _fast(attack: AutoAttack) -> tuple[search.Search, ...]:
  ce, towards, *_ = _standard(attack)
  n = attack.num_steps
  fab = Fab(attack.threat, num_targets=9, stop=True, num_steps=n, reach=2.0)
  square = Square(attack.threat, num_queries=attack.num_queries, share=0.1)
  return towards, ce, fab, square


_PARTS: dict[str, Any] = {
  "standard": _standard,
  "plus": _plus,
  "rand": _rand,
  "fast": _fast,
}
