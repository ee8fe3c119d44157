"""Methods of fine-tuning by name."""

from roli_jax.peft.exchange import (
  load,
  merge,
  restore,
  state_dict,
  without,
)
from roli_jax.peft.method import (
  FROZEN,
  GROUPS,
  METHODS,
  Method,
  adapter,
  autolora,
  bias,
  full,
  linear,
  lora,
  vpt,
)

__all__ = [
  "FROZEN",
  "GROUPS",
  "METHODS",
  "Method",
  "adapter",
  "autolora",
  "bias",
  "full",
  "linear",
  "load",
  "lora",
  "merge",
  "restore",
  "state_dict",
  "vpt",
  "without",
]
