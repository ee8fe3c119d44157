"""A bundle: a model with its weights, in one safetensors file.

Leaves stand under their paths (`backbone/block0/attn/q/kernel`, `head/bias`,
`stats/...`). The file's metadata name the model and how it wants its images.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import models, trees
from roli_jax.types import Params, PyTree

FORMAT = "roli_jax"


@dataclasses.dataclass(frozen=True)
class Coverage:
  """What became of each tensor of a foreign file.

  Attributes:
    layout: the names that it has.
    wrapped: the name of the network in the file, "" for the file itself.
    used: keys of the tensors that the model is made of.
    resampled: those of them that were fitted to another size of images.
    dropped: the file's classifier, where a new one was asked for.
    ignored: what no pass needs, by rule.
    normalised_by: where mean and standard deviation are from.
    others: the networks in the file that were not taken, "" without any.
    assumed: what the file can't tell, a sentence each.
  """

  layout: str
  wrapped: str
  used: tuple[str, ...]
  resampled: tuple[str, ...]
  dropped: tuple[str, ...]
  ignored: tuple[str, ...]
  normalised_by: str
  others: str = ""
  assumed: tuple[str, ...] = ()

  def notes(self) -> list[str]:
    """What whoever takes the weights has to know, a sentence each."""
    notes = list(self.assumed)
    if self.others:
      taken = self.wrapped or "."
      notes.append(f"{taken} is taken; key= takes another: {self.others}")
    return notes


@dataclasses.dataclass(frozen=True)
class Bundle:
  """A model, its parameters and its running statistics (`{}` without any).

  Attributes:
    model: the static half.
    params: the three trees.
    stats: running statistics.
    layout: the names of the foreign file that it came from; "": none.
    extras: tensors of that file that no pass needs, for the way back.
    coverage: what became of that file's tensors.
  """

  model: models.Model
  params: Params
  stats: PyTree
  layout: str = ""
  extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  coverage: Coverage | None = None


def write(bundle: Bundle, path: pathlib.Path) -> None:
  """Writes the bundle; a reader of a file half written is left the old one.

  Raises:
    ValueError: a method has added to the backbone.
  """
  if bundle.params.peft:
    raise ValueError(
      f"a bundle can't hold {list(trees.paths(bundle.params.peft))[:2]};"
      " peft.merge what a method has added, or write peft.state_dict"
    )
  tree = {
    "backbone": bundle.params.backbone,
    "head": bundle.params.head,
    "stats": bundle.stats,
    "extras": bundle.extras,
  }
  about = {**models.to_spec(bundle.model), "layout": bundle.layout}
  metadata = {"format": FORMAT, "model": json.dumps(about)}
  write_tensors(trees.paths(tree), path, metadata)


def write_tensors(
  tensors: Mapping[str, Any], path: pathlib.Path, metadata: dict[str, str]
) -> None:
  """Writes a safetensors file, whole or not at all."""
  from safetensors import numpy as safetensors

  partial = path.with_name(path.name + ".partial")
  # safetensors writes an array's memory as it lies, transposed or not.
  arrays = {k: np.array(v, order="C") for k, v in tensors.items()}
  # Its own save_file makes files that only their owner can read.
  partial.write_bytes(safetensors.save(arrays, metadata))
  partial.replace(path)


def from_tensors(
  tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], what: str
) -> Bundle:
  """The bundle of what `write` wrote.

  Raises:
    ValueError: leaves that are not the model's, both sides listed, or that
      are not finite.
  """
  about = json.loads(metadata["model"])
  tree = trees.unpaths(dict(tensors))
  params = Params(
    backbone=tree.get("backbone", {}),
    peft={},
    head=tree.get("head", {}),
  )
  bundle = Bundle(
    models.from_spec(about),
    params,
    tree.get("stats", {}),
    about.get("layout", ""),
    tree.get("extras", {}),
  )
  check(bundle, what)
  return bundle


def check(bundle: Bundle, what: str) -> None:
  """Raises a ValueError unless the leaves are the model's, and in order."""
  expected = jax.eval_shape(bundle.model.init, jax.random.key(0))
  trees.check_same((bundle.params, bundle.stats), expected, what)
  check_arrays(
    {**trees.paths(bundle.params), **trees.paths(bundle.stats)}, what
  )


def check_arrays(arrays: Mapping[str, Any], what: str) -> None:
  """Raises a ValueError unless all are floats of 16 bits or more, and finite.

  Whole numbers and 8 bits are quantized weights, whose scale is elsewhere.
  """
  for name, array in arrays.items():
    dtype = np.asarray(array).dtype
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize not in (
      2,
      4,
      8,
    ):
      raise ValueError(
        f"{what}: {name} is {dtype}, and weights are float32, float64, float16"
        " or bfloat16; if it is quantized, bring it back to float32 first"
      )
    if not np.isfinite(array).all():
      raise ValueError(f"{what}: {name} holds values that are not finite")


def with_classes(
  model: models.Model, num_classes: int, head_init: str = "kaiming_fan_out"
) -> models.Model:
  """The same backbone under a new linear head."""
  head = models.heads.linear(num_classes, head_init)
  return dataclasses.replace(model, head=head, num_classes=num_classes)


def zero_head(model: models.Model) -> PyTree:
  """The head's tree, all zeros."""
  like, _ = jax.eval_shape(model.init, jax.random.key(0))
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like.head)
