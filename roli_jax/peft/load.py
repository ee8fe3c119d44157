"""What a method has trained elsewhere, put into a bundle."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from roli_jax import models, specs, trees
from roli_jax.convert import Bundle, with_classes
from roli_jax.models import Seams
from roli_jax.peft import modules

_NAMES = (
  # ours, theirs; of a ViT and of a Swin
  (r"block(\d+)/attn/(q|v)/(a|b)", r"blocks.\1.attn.\2_lora.\3"),
  (r"block(\d+)/branch/(\w+)/(\w+)", r"blocks.\1.adapter.\2.\3"),
  (r"tokens(\d+)/prompt", r"prompts.\1.prompt"),
  (
    r"stage(\d+)/block(\d+)/attn/(q|v)/(a|b)",
    r"layers.\1.blocks.\2.attn.\3_lora.\4",
  ),
  (
    r"stage(\d+)/block(\d+)/branch/(\w+)/(\w+)",
    r"layers.\1.blocks.\2.adapter.\3.\4",
  ),
  (r"stage(\d+)/tokens(\d+)/prompt", r"prompts.\1.\2.prompt"),
)
_WORDS = {
  ".q_lora.": ".query_lora.",
  ".v_lora.": ".value_lora.",
  "_lora.a": "_lora.A",
  "_lora.b": "_lora.B",
  ".kernel": ".weight",
}


def load(
  bundle: Bundle,
  state_dict: Mapping[str, Any],
  method: str,
  *,
  rank: int = 16,
  alpha: float | int = 16,
  reduction: int = 8,
  tokens: int = 10,
) -> Bundle:
  """The bundle with what a method has added to it, and its classifier.

  Args:
    bundle: a ViT or a Swin.
    state_dict: `blocks.i.attn.query_lora.A` [rank, d], `.B` [d, rank] and
      `value_lora`; `blocks.i.adapter.down.weight` [d / reduction, d], `.bias`,
      `up`; `prompts.i.prompt` [tokens, d]; of a Swin `layers.s.blocks.j` and
      `prompts.s.j`. `classifier.weight` [k, d] and `.bias`.
    method: `lora`, `adapter`, `vpt` (deep), or `linear` for the classifier
      alone.
    rank: of LoRA.
    alpha: of LoRA.
    reduction: of adapters.
    tokens: of VPT, in each block.

  Raises:
    ValueError: tensors that are missing, left over or of another shape, both
      sides listed.
  """
  backbone: Any = bundle.model.backbone
  width = getattr(backbone, "width", 0)
  patch = getattr(backbone, "patch", 0)
  makers = {
    "linear": lambda: Seams(),
    "lora": lambda: modules.lora(rank, alpha),
    "adapter": lambda: modules.adapter(reduction),
    "vpt": lambda: modules.vpt(tokens, patch, width),
  }
  if not isinstance(backbone, models.Vit | models.Swin):
    raise ValueError(f"expected a ViT or a Swin, got a {bundle.model.name}")
  seams = specs.choose(makers, method, "method")()
  arrays = {key: np.asarray(value) for key, value in state_dict.items()}
  classifier = arrays.get("classifier.bias", np.zeros(2))
  model = with_classes(bundle.model, len(classifier))
  model = dataclasses.replace(model, backbone=backbone.clone(seams=seams))
  like, _ = jax.eval_shape(model.init, jax.random.key(0))
  theirs = {
    **{_name(path): path for path in trees.paths({"peft": like.peft})},
    "classifier.weight": "head/kernel",
    "classifier.bias": "head/bias",
  }
  shapes = trees.paths({"peft": like.peft, "head": like.head})
  turned = {
    key: array.T if _is_matrix(key) and array.ndim == 2 else array
    for key, array in arrays.items()
  }
  trees.check_shapes(
    {key: array.shape for key, array in turned.items()},
    {key: shapes[path].shape for key, path in theirs.items()},
    f"the {method} state dict",
  )
  tree = trees.unpaths({theirs[key]: turned[key] for key in theirs})
  params = dataclasses.replace(
    bundle.params, peft=tree.get("peft", {}), head=tree["head"]
  )
  return dataclasses.replace(bundle, model=model, params=params)


def _name(path: str) -> str:
  """What the state dict calls a leaf."""
  for pattern, name in _NAMES:
    match = re.fullmatch(f"peft/{pattern}", path)
    if match:
      named = match.expand(name)
      for ours, their in _WORDS.items():
        named = named.replace(ours, their)
      return named
  raise ValueError(f"there is no name for {path}")


def _is_matrix(key: str) -> bool:
  """Whether it is laid out as PyTorch's linear layers, outputs first."""
  return key.endswith((".weight", "_lora.A", "_lora.B"))
