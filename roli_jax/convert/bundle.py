"""A bundle: a model with its weights, in one safetensors file.

Leaves stand under their paths (`backbone/block0/attn/q/kernel`, `head/bias`,
`stats/...`). The file's metadata name the model and how it wants its images.
"""

import dataclasses
import importlib.resources
import json
import pathlib

import jax
import numpy as np

from roli_jax import models, trees
from roli_jax.types import Params, PyTree

_FORMAT = "roli_jax"


@dataclasses.dataclass(frozen=True)
class Bundle:
  """A model, its parameters and its running statistics (`{}` without any)."""

  model: models.Model
  params: Params
  stats: PyTree


def shipped(model: str) -> dict[str, pathlib.Path]:
  """The weights of this model that come with the package, by name."""
  folder = pathlib.Path(str(importlib.resources.files("roli_jax"))) / "weights"
  files = sorted(folder.glob(f"{model}_*.safetensors"))
  return {file.stem.removeprefix(f"{model}_"): file for file in files}


def find(model: str, weights: str, hint: str = "") -> pathlib.Path:
  """The file that a config means by a model and its weights.

  Args:
    model: a name in `models.MODELS`.
    weights: the name of shipped weights (`robust`), or a path.
    hint: how to get them, for the message.

  Raises:
    ValueError: neither; the message says which there are.
  """
  names = shipped(model)
  if weights in names:
    return names[weights]
  path = pathlib.Path(weights).expanduser()
  if path.is_file():
    return path
  known = f"; {model} comes with {', '.join(names)}" if names else ""
  how = f"; {hint}" if hint else ""
  raise ValueError(f"no weights of {model} at {weights!r}{known}{how}")


def save(bundle: Bundle, path: str | pathlib.Path) -> None:
  """Writes the bundle; a reader of a file half written is left the old one."""
  from safetensors import numpy as safetensors

  tree = {
    "backbone": bundle.params.backbone,
    "peft": bundle.params.peft,
    "head": bundle.params.head,
    "stats": bundle.stats,
  }
  metadata = {
    "format": _FORMAT,
    "model": json.dumps(models.describe(bundle.model)),
  }
  path = pathlib.Path(path)
  partial = path.with_name(path.name + ".partial")
  arrays = {k: np.asarray(v) for k, v in trees.paths(tree).items()}
  # Its own save_file makes files that only their owner can read.
  partial.write_bytes(safetensors.save(arrays, metadata))
  partial.replace(path)


def load(source: str | pathlib.Path, num_classes: int | None = None) -> Bundle:
  """The bundle of a file.

  Args:
    source: a safetensors file that `save` wrote.
    num_classes: None keeps the file's classifier; a number drops it and puts a
      zero head of that width.

  Raises:
    ValueError: the file can't be read, is of another format, or its leaves are
      not the model's; both sides are listed.
  """
  from safetensors import SafetensorError, safe_open

  path = pathlib.Path(source)
  try:
    with safe_open(path, "numpy") as file:
      metadata = file.metadata() or {}
      names = list(file.keys())
      tree = trees.unpaths({k: file.get_tensor(k) for k in names})
  except (OSError, SafetensorError) as error:
    raise ValueError(f"{path} can't be read: {error}") from error
  if metadata.get("format") != _FORMAT:
    raise ValueError(
      f"{path} is no bundle of roli_jax: its metadata say"
      f" {metadata.get('format')!r}"
    )
  model = models.described(json.loads(metadata["model"]))
  params = Params(
    backbone=tree.get("backbone", {}),
    peft=tree.get("peft", {}),
    head=tree.get("head", {}),
  )
  stats = tree.get("stats", {})
  expected = jax.eval_shape(model.init, jax.random.key(0))
  trees.check_same((params, stats), expected, str(path))
  for name, leaf in trees.paths(params).items():
    if not np.isfinite(leaf).all():
      raise ValueError(f"{path}: {name} holds values that are not finite")
  if num_classes is not None:
    model = with_classes(model, num_classes)
    like, _ = jax.eval_shape(model.init, jax.random.key(0))
    head = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like.head)
    params = dataclasses.replace(params, head=head)
  return Bundle(model, params, stats)


def with_classes(
  model: models.Model, num_classes: int, head_init: str = "kaiming_fan_out"
) -> models.Model:
  """The same backbone under a new linear head."""
  head = models.heads.linear(num_classes, head_init)
  return dataclasses.replace(model, head=head, num_classes=num_classes)
