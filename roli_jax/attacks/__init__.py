"""Attacks on any function `logits_fn(images) -> logits`."""

from typing import Any

from roli_jax import specs
from roli_jax.attacks.base import Attack
from roli_jax.attacks.gradient import Fgsm, Pgd
from roli_jax.threat import ThreatModel

ATTACKS: dict[str, Any] = {"fgsm": Fgsm, "pgd": Pgd}


def build(name: str, threat: ThreatModel, **fields: Any) -> Attack:
  """The attack of that name.

  Example:
    >>> threat = ThreatModel("linf", eps=8 / 255)
    >>> build("pgd", threat, num_steps=7, step_size="2/255").num_steps
    7

  Args:
    name: one of `ATTACKS`.
    threat: the ball and the box.
    **fields: the attack's own, as its class documents them; `step_size` may be
      text such as `2/255` or `eps/4`.

  Raises:
    ValueError: an unknown name or field, or a value out of its range.
  """
  if isinstance(fields.get("step_size"), str):
    eps = threat.eps if isinstance(threat.eps, int | float) else None
    fields["step_size"] = specs.number(fields["step_size"], eps)
  spec = {"name": name, **fields}
  return specs.build(ATTACKS, spec, "attack", threat=threat)


__all__ = ["ATTACKS", "Attack", "Fgsm", "Pgd", "build"]
