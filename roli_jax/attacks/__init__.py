"""Attacks on any function `logits_fn(images) -> logits`."""

import functools
from typing import Any

from roli_jax import specs
from roli_jax.attacks.apgd import Apgd, ApgdMaxLoss
from roli_jax.attacks.autoattack import AutoAttack
from roli_jax.attacks.base import Attack
from roli_jax.attacks.curve import Curve
from roli_jax.attacks.fab import Fab
from roli_jax.attacks.gradient import Fgsm, Pgd
from roli_jax.attacks.search import Search, trajectory
from roli_jax.attacks.square import Square
from roli_jax.threat import ThreatModel

ATTACKS: dict[str, Any] = {
  "fgsm": Fgsm,
  "pgd": Pgd,
  "apgd_ce": functools.partial(Apgd, loss="ce"),
  "apgd_dlr": functools.partial(Apgd, loss="dlr"),
  "apgd_t": functools.partial(Apgd, loss="dlr", num_targets=9),
  "fab": Fab,
  "fab_t": functools.partial(Fab, num_targets=9),
  "square": Square,
  "autoattack": AutoAttack,
  "autoattack_plus": functools.partial(AutoAttack, version="plus"),
  "autoattack_rand": functools.partial(AutoAttack, version="rand"),
  "autoattack_fast": functools.partial(AutoAttack, version="fast"),
  "curve": Curve,
}


def build(name: str, threat: ThreatModel, **fields: Any) -> Attack:
  """The attack of that name.

  Examples:
    >>> threat = ThreatModel("linf", eps=8 / 255)
    >>> build("pgd", threat, num_steps=7, step_size="2/255").num_steps
    7

  Args:
    name: one of `ATTACKS`.
    threat: the ball and the box.
    **fields: the attack's own, as its class documents them; `step_size` may be
      text such as `2/255` or `eps/4`. With `targeted=True` labels are targets:
      of fgsm, pgd, apgd_ce, apgd_dlr, fab and square.

  Raises:
    ValueError: an unknown name or field, or a value out of its range.
  """
  if isinstance(fields.get("step_size"), str):
    eps = threat.eps if isinstance(threat.eps, int | float) else None
    fields["step_size"] = specs.number(fields["step_size"], eps)
  spec = {"name": name, **fields}
  return specs.build(ATTACKS, spec, "attack", threat=threat)


__all__ = [
  "ATTACKS",
  "Apgd",
  "ApgdMaxLoss",
  "Attack",
  "AutoAttack",
  "Curve",
  "Fab",
  "Fgsm",
  "Pgd",
  "Search",
  "Square",
  "build",
  "trajectory",
]
