"""Pretrained weights: from files to models, and back."""

from roli_jax.convert.bundle import Bundle, Coverage, with_classes
from roli_jax.convert.contents import from_stage
from roli_jax.convert.files import (
  adjusted,
  find,
  load,
  read,
  save,
  shipped,
  text_tower,
)
from roli_jax.convert.name_maps import FORMATS
from roli_jax.convert.state_dict import to_state_dict

__all__ = [
  "FORMATS",
  "Bundle",
  "Coverage",
  "adjusted",
  "find",
  "from_stage",
  "load",
  "read",
  "save",
  "shipped",
  "text_tower",
  "to_state_dict",
  "with_classes",
]
