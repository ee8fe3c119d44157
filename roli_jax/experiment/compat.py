"""Switches that make a run as RoLI's reference code would, defects included.

The defaults are right. With every switch at the value of the reference
(github.com/DongXzz/RoLI), which `configs/common.py` has, a run follows it but
for what docs/methods.md lists.
"""

from collections.abc import Mapping
from typing import Any

from roli_jax import specs

# Each switch's values; the first is what holds where a config says nothing.
SWITCHES: dict[str, tuple[Any, ...]] = {
  # all_zero: of an adapter, one bias can ever move.
  "adapter_init": ("near_identity", "all_zero"),
  # both_zero: LoRA never moves.
  "lora_init": ("standard", "both_zero"),
  # Whether the dropout that peft.lora.dropout declares acts.
  "lora_dropout_active": (False, True),
  # Whether linear, bias, lora and adapter train in evaluation mode.
  "frozen_encoder_eval": (True, False),
  # batch: PGD keeps one iterate for the whole batch.
  "pgd_best": ("sample", "batch", "last"),
  # reference: eps in the uncorrected denominator, decay after the step.
  "adamw_eps_style": ("standard", "reference"),
  # fixed_0.01: AdamW's decay, whatever the config says.
  "adamw_decay": ("config", "fixed_0.01"),
  # Whether a decay of 0 means SGD with momentum 0.9.
  "zero_decay_means_sgd": (False, True),
  # epoch: the rate changes between epochs only.
  "lr_granularity": ("step", "epoch"),
  # Whether the first step (or epoch) has rate 0.
  "warmup_starts_at_zero": (False, True),
  # as_is: a Swin's windows get the prompts of other images.
  "swin_prompt_order": ("fixed", "as_is"),
  # Of the last block, in training; where the backbone is in training mode.
  "droppath_rate": (0.0,),
  # The random head's start, see `models.heads.linear`.
  "head_init": ("kaiming_fan_out", "small"),
  # return: a loss that is NaN or +inf ends the run, which saves no more.
  "nan_policy": ("raise", "return"),
}


def switches(config: Mapping[str, Any]) -> dict[str, Any]:
  """All switches, those that `config.compat` leaves out at their defaults.

  Raises:
    ValueError: an unknown switch, or a value that one hasn't.
  """
  given = config.get("compat", {})
  for name, value in given.items():
    known = specs.lookup(SWITCHES, name, "compat switch")
    if name == "droppath_rate":
      if not 0 <= value < 1:
        raise ValueError(
          f"compat.droppath_rate is a share in [0, 1), got {value}"
        )
    elif value not in known:
      names = ", ".join(map(str, known))
      raise ValueError(f"compat.{name} is one of {names}; got {value!r}")
  return {name: values[0] for name, values in SWITCHES.items()} | dict(given)
