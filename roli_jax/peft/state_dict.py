"""The leaves that a method adds to a backbone: in files, and folded into it."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from roli_jax import convert, models, specs, trees
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
  """Returns the bundle with a method's tensors and classifier loaded into it.

  Args:
    bundle: the backbone.
    state_dict: the tensors by name. For a ViT `blocks.i.attn.query_lora.A`
      [rank, d], `.B` [d, rank] and `value_lora`; `blocks.i.adapter.down.weight`
      [d / reduction, d], `.bias`, `up`; `prompts.i.prompt` [tokens, d]. For a
      Swin `layers.s.blocks.j` and `prompts.s.j`. For others the names that
      `state_dict` gives. `classifier.weight` [k, d] and `.bias` [k].
    method: `lora`, `adapter`, `vpt`, or `linear` for the classifier alone.
    rank: see `lora`.
    alpha: see `lora`.
    reduction: see `adapter`.
    tokens: see `vpt`.
    deep: see `vpt`.

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
  fields = specs.lookup(options, method, "method")
  arrays = {key: np.asarray(value) for key, value in state_dict.items()}
  bundles.check_arrays(arrays, f"the {method} state dict")
  classifier = arrays.get("classifier.bias", np.zeros(2))
  model = METHODS[method](**fields).apply_to(
    with_classes(bundle.model, len(classifier))
  )
  like, _ = model.shapes()
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
  # Names of another number of classes are not this classifier's.
  same = len(classifier) == bundle.model.num_classes
  classes = bundle.classes if same else ()
  return dataclasses.replace(
    bundle, model=model, params=params, classes=classes
  )


def state_dict(bundle: Bundle) -> dict[str, np.ndarray]:
  """Returns a method's tensors and the classifier's, in the form of `load`."""
  params = bundle.params
  leaves = trees.paths({"peft": params.peft, "head": params.head})
  return {
    _name(path): np.ascontiguousarray(_turned(_name(path), np.asarray(leaf)))
    for path, leaf in leaves.items()
  }


def restore(path: pathlib.Path) -> tuple[Bundle, Method]:
  """Restores the checkpoint of a run, whatever its method, and the method.

  Args:
    path: the directory of a step or a stage, or one above a single stage.

  Raises:
    ValueError: there is none, or more than one stage.
  """
  found: list[Method] = []

  def enter(model: models.Model, meta: Mapping[str, Any]) -> models.Model:
    found.append(specs.build(METHODS, meta["method"], "method"))
    return found[0].apply_to(model)

  return convert.from_stage(path, enter), found[0]


def merge(bundle: Bundle, method: Method) -> Bundle:
  """Folds LoRA into the kernels: a plain backbone that computes the same.

  A bundle without leaves of a method is returned unchanged.

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
  """Returns the backbone and the head, without the leaves of a method."""
  model = METHODS["linear"]().apply_to(bundle.model)
  params = dataclasses.replace(bundle.params, peft={})
  return dataclasses.replace(bundle, model=model, params=params)


def _name(path: str) -> str:
  """Returns a leaf's name in the state dict: its path if there is no other."""
  path = path.replace("head/", "classifier/").removeprefix("peft/")
  named = path.replace("/", ".")
  for pattern, name in _NAMES:
    match = re.fullmatch(pattern, path)
    if match:
      named = match.expand(name)
  for ours, theirs in _WORDS.items():
    named = named.replace(ours, theirs)
  return named


def _turned(key: str, array: np.ndarray) -> np.ndarray:
  """Transposes matrices: PyTorch's linear layers have the outputs first."""
  is_matrix = key.endswith((".weight", "_lora.A", "_lora.B"))
  return array.T if is_matrix and array.ndim == 2 else array
