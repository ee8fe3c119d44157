"""Methods of fine-tuning by name."""

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
from roli_jax.peft.state_dict import load, merge, restore, state_dict, without

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
