"""Methods of fine-tuning by name."""

from roli_jax.peft.load import load
from roli_jax.peft.method import BIAS, FROZEN, FULL, GROUPS, LINEAR, Method

METHODS = {method.name: method for method in (LINEAR, FULL, BIAS)}

__all__ = [
  "BIAS",
  "FROZEN",
  "FULL",
  "GROUPS",
  "LINEAR",
  "METHODS",
  "Method",
  "load",
]
