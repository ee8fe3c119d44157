"""What a method has added to a backbone: in files, and folded into it."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from roli_jax import convert, specs, trees
from roli_jax.convert import Bundle, with_classes
from roli_jax.convert import bundle as bundles
from roli_jax.peft.method import METHODS, Method

_NAMES = (
  # ours, theirs; of a backbone of blocks and of one of stages
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
  deep: bool = True,
) -> Bundle:
  """The bundle with what a method has added to it, and its classifier.

  Args:
    bundle: of the backbone.
    state_dict: of a ViT `blocks.i.attn.query_lora.A` [rank, d], `.B` [d, rank]
      and `value_lora`; `blocks.i.adapter.down.weight` [d / reduction, d],
      `.bias`, `up`; `prompts.i.prompt` [tokens, d]. Of a Swin
      `layers.s.blocks.j` and `prompts.s.j`. Of others as `state_dict` names
      them. `classifier.weight` [k, d] and `.bias`.
    method: `lora`, `adapter`, `vpt`, or `linear` for the classifier alone.
    rank: of LoRA.
    alpha: of LoRA.
    reduction: of adapters.
    tokens: of VPT, in each block.
    deep: of VPT.

  Raises:
    ValueError: tensors that are missing, left over or of another shape, both
      sides listed; tensors that are no floats, or not finite.
  """
  options: dict[str, dict[str, Any]] = {
    "linear": {},
    "lora": {"rank": rank, "alpha": alpha},
    "adapter": {"reduction": reduction},
    "vpt": {"tokens": tokens, "deep": deep},
  }
  own = specs.lookup(options, method, "method")
  arrays = {key: np.asarray(value) for key, value in state_dict.items()}
  bundles.check_arrays(arrays, f"the {method} state dict")
  classifier = arrays.get("classifier.bias", np.zeros(2))
  model = METHODS[method](**own).apply_to(
    with_classes(bundle.model, len(classifier))
  )
  like, _ = jax.eval_shape(model.init, jax.random.key(0))
  shapes = trees.paths({"peft": like.peft, "head": like.head})
  theirs = {_name(path): path for path in shapes}
  turned = {key: _turned(key, array) for key, array in arrays.items()}
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


def state_dict(bundle: Bundle) -> dict[str, np.ndarray]:
  """What a method has added, and the classifier: what `load` takes."""
  params = bundle.params
  leaves = trees.paths({"peft": params.peft, "head": params.head})
  return {
    _name(path): np.ascontiguousarray(_turned(_name(path), np.asarray(leaf)))
    for path, leaf in leaves.items()
  }


def restore(path: pathlib.Path) -> tuple[Bundle, Method]:
  """The checkpoint of a run, whatever its method, and the method.

  Args:
    path: of a step or a stage of a run, or above a single stage.

  Raises:
    ValueError: there is none, or more than one stage.
  """
  found: list[Method] = []

  def enter(model, meta):
    found.append(specs.build(METHODS, meta["method"], "method"))
    return found[0].apply_to(model)

  return convert.from_stage(path, enter), found[0]


def merge(bundle: Bundle, method: Method) -> Bundle:
  """The plain backbone that computes the same: LoRA is folded into kernels.

  A bundle that nothing was added to is left as it is.

  Raises:
    ValueError: adapters and prompts, which no kernel can hold.
  """
  peft = trees.paths(bundle.params.peft)
  if not peft:
    return bundle
  if not method.scale:
    raise ValueError(
      f"{method.name} can't be merged into a backbone; export it beside, by"
      " peft.state_dict"
    )
  kernels = trees.paths(bundle.params.backbone)
  for path in [path for path in peft if path.endswith("/a")]:
    name = path.removesuffix("a") + "kernel"
    kernel = np.asarray(kernels[name])
    a, b = (
      np.asarray(peft[path.removesuffix("a") + leaf], np.float64)
      for leaf in "ab"
    )
    folded = kernel + method.scale * (a @ b).reshape(kernel.shape)
    kernels[name] = folded.astype(kernel.dtype)
  params = dataclasses.replace(bundle.params, backbone=trees.unpaths(kernels))
  return without(dataclasses.replace(bundle, params=params))


def without(bundle: Bundle) -> Bundle:
  """The backbone and the head, without what a method has added."""
  model = METHODS["linear"]().apply_to(bundle.model)
  params = dataclasses.replace(bundle.params, peft={})
  return dataclasses.replace(bundle, model=model, params=params)


def _name(path: str) -> str:
  """What the state dict calls a leaf; our own name where there is no other."""
  path = path.replace("head/", "classifier/").removeprefix("peft/")
  named = path.replace("/", ".")
  for pattern, name in _NAMES:
    match = re.fullmatch(pattern, path)
    if match:
      named = match.expand(name)
  for ours, their in _WORDS.items():
    named = named.replace(ours, their)
  return named


def _turned(key: str, array: np.ndarray) -> np.ndarray:
  """As PyTorch's linear layers have it, outputs first, and back."""
  is_matrix = key.endswith((".weight", "_lora.A", "_lora.B"))
  return array.T if is_matrix and array.ndim == 2 else array
