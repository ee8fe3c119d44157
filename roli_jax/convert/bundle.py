"""A bundle: a model with its weights, in one safetensors file.

Leaves stand under their paths (`backbone/block0/attn/q/kernel`, `head/bias`,
`stats/...`). The file's metadata name the model and how it wants its images.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import models, trees
from roli_jax.convert import plain, resample
from roli_jax.types import Params, PyTree

FORMAT = "roli_jax"


@dataclasses.dataclass(frozen=True)
class Coverage:
  """What became of each tensor of a foreign file.

  Attributes:
    layout: the name of the `Layout` whose names the tensors have.
    wrapped: the name of the network in the file, "" for the file itself.
    used: keys of the tensors that the model is made of.
    resampled: keys of those that were fitted to another size of images.
    dropped: keys of the file's classifier, where a new one was asked for.
    ignored: keys of tensors that no pass needs, by rule.
    normalised_by: where mean and standard deviation are from.
    others: the networks in the file that were not taken, "" without any.
  """

  layout: str
  wrapped: str
  used: tuple[str, ...]
  resampled: tuple[str, ...]
  dropped: tuple[str, ...]
  ignored: tuple[str, ...]
  normalised_by: str
  others: str = ""

  def notes(self) -> list[str]:
    """Returns what a user of the weights has to know, a sentence each."""
    if not self.others:
      return []
    taken = self.wrapped or "."
    return [f"{taken} is taken; key= takes another: {self.others}"]


@dataclasses.dataclass(frozen=True)
class Bundle:
  """A model, its parameters and its running statistics (`{}` without any).

  Attributes:
    model: the static half of the classifier.
    params: its three trees, as NumPy arrays.
    stats: its running statistics.
    layout: the name of the foreign file's `Layout`; "" for a file of ours.
    extras: tensors of that file that no pass needs, by their keys, so that
      they can be written again.
    coverage: what became of that file's tensors; None for a file of ours.
    classes: the names of the head's classes; empty where no file told them.
    assumed: what that file couldn't tell and nobody has told, by the argument
      of `convert.load` that would; kept in files of ours.
  """

  model: models.Model
  params: Params
  stats: PyTree
  layout: str = ""
  extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  coverage: Coverage | None = None
  classes: tuple[str, ...] = ()
  assumed: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write(bundle: Bundle, path: pathlib.Path, half: bool = False) -> None:
  """Writes the bundle; while it is written, readers find the old file.

  Args:
    bundle: the bundle.
    path: the file.
    half: whether the file holds float16, which reads back as float32.

  Raises:
    ValueError: a method has added to the backbone; weights that float16 can't
      hold.
  """
  if bundle.params.peft:
    raise ValueError(
      f"a bundle can't hold {list(trees.paths(bundle.params.peft))[:2]};"
      " peft.merge what a method has added, or write peft.state_dict"
    )
  leaves = trees.paths(
    {
      "backbone": bundle.params.backbone,
      "head": bundle.params.head,
      "stats": bundle.stats,
    }
  )
  if half:
    with np.errstate(over="ignore"):  # the check says where
      halves = {k: np.asarray(v, np.float16) for k, v in leaves.items()}
    check_arrays(halves, f"{path.name}, in float16")
    for name, leaf in leaves.items():
      if np.any(leaf) and not np.any(halves[name]):
        raise ValueError(f"{path.name}: {name} is all 0 in float16")
    leaves = halves
  leaves |= trees.paths({"extras": bundle.extras})
  about = {**models.to_spec(bundle.model), "layout": bundle.layout}
  if bundle.assumed:
    about["assumed"] = dict(bundle.assumed)
  metadata = {
    "format": FORMAT,
    "model": json.dumps(about),
    "classes": json.dumps(bundle.classes),
  }
  write_tensors(leaves, path, metadata)


def write_tensors(
  tensors: Mapping[str, Any], path: pathlib.Path, metadata: dict[str, str]
) -> None:
  """Writes a safetensors file; while it is written, readers find the old.

  A file whose suffix is `.npz` is NumPy's, and has no metadata.
  """
  from safetensors import numpy as safetensors

  partial = path.with_name(path.name + ".partial")
  # safetensors writes an array's memory in its order, even if transposed.
  arrays = {k: np.array(v, order="C") for k, v in tensors.items()}
  if path.suffix.lower() == ".npz":
    with partial.open("wb") as file:
      np.savez(file, allow_pickle=False, **arrays)
  else:
    # Its own save_file makes files that only their owner can read.
    partial.write_bytes(safetensors.save(arrays, metadata))
  partial.replace(path)


def from_tensors(
  tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], what: str
) -> Bundle:
  """Returns the bundle that `write` wrote, half precision as float32.

  Args:
    tensors: the arrays of the file, by the paths of leaves.
    metadata: those of the file, which name the model.
    what: the name of the file, for messages.

  Raises:
    ValueError: leaves that are not the model's, both sides listed, or that
      are not finite.
  """
  about = json.loads(metadata["model"])
  tree = trees.unpaths({k: plain.widened(v) for k, v in tensors.items()})
  bundle = Bundle(
    models.from_spec(about),
    params_of(tree),
    tree.get("stats", {}),
    about.get("layout", ""),
    tree.get("extras", {}),
    classes=tuple(json.loads(metadata.get("classes", "[]"))),
    assumed=about.get("assumed", {}),
  )
  check(bundle, what)
  return bundle


def params_of(tree: Mapping[str, PyTree]) -> Params:
  """Returns a tree's `backbone` and `head`, where it has them."""
  return Params(
    backbone=tree.get("backbone", {}), peft={}, head=tree.get("head", {})
  )


def check(bundle: Bundle, what: str) -> None:
  """Raises a ValueError unless the leaves are the model's, floats, finite."""
  expected = bundle.model.shapes()
  variables = (bundle.params, bundle.stats)
  trees.check_same(variables, expected, what)
  arrays = {k: v for tree in variables for k, v in trees.paths(tree).items()}
  check_arrays(arrays, what)


def check_arrays(arrays: Mapping[str, Any], what: str) -> None:
  """Raises a ValueError unless all are floats of 16 bits or more, and finite.

  Integers and 8 bits are quantized weights, whose scale is elsewhere.

  Args:
    arrays: by name.
    what: the name of what holds them, for the message.
  """
  for name, array in arrays.items():
    dtype = np.asarray(array).dtype
    is_float = jnp.issubdtype(dtype, jnp.floating)
    if not is_float or dtype.itemsize not in (2, 4, 8):
      raise ValueError(
        f"{what}: {name} is {dtype}, and weights are float32, float64, float16"
        " or bfloat16; if it is quantized, bring it back to float32 first"
      )
    if not np.isfinite(array).all():
      raise ValueError(f"{what}: {name} holds values that are not finite")


def with_classes(
  model: models.Model, num_classes: int, head_init: str = "kaiming_fan_out"
) -> models.Model:
  """Returns the same backbone under a new linear head.

  Args:
    model: any model.
    num_classes: the width of the head.
    head_init: the distribution that its kernel is drawn from.
  """
  head = models.heads.linear(num_classes, head_init)
  return dataclasses.replace(model, head=head, num_classes=num_classes)


def fitted(
  bundle: Bundle,
  mean: Sequence[float | int] | None,
  std: Sequence[float | int] | None,
  num_classes: int | None,
  image_size: int | None,
) -> tuple[Bundle, list[str]]:
  """Returns the bundle for other images or classes, and the resampled leaves.

  Args:
    bundle: any bundle.
    mean: per channel, in units of [0, 1]; None: the bundle's.
    std: per channel; None: the bundle's.
    num_classes: the width of a new head of zeros; None: the bundle's head.
    image_size: the side that images are resized to; None: the bundle's.

  Raises:
    ValueError: see `_each_channel`; the backbone can't take images of that
      side.
  """
  params = bundle.params
  model = dataclasses.replace(
    bundle.model,
    mean=_each_channel(mean, bundle.model.mean, "mean"),
    std=_each_channel(std, bundle.model.std, "std"),
  )
  resampled: list[str] = []
  if image_size is not None:
    model, params, resampled = resample.to_size(model, params, image_size)
  if num_classes is not None:
    model = with_classes(model, num_classes)
    like, _ = model.shapes()
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like.head)
    params = dataclasses.replace(params, head=zeros)
    bundle = dataclasses.replace(bundle, classes=())
  return dataclasses.replace(bundle, model=model, params=params), resampled


def _each_channel(
  given: Sequence[float | int] | None, default: tuple[float, ...], what: str
) -> tuple[float, ...]:
  """Returns the given numbers, one a channel, or else the default.

  Raises:
    ValueError: not as many numbers as `default` has, or not finite; a standard
      deviation that is not positive.
  """
  values = default if given is None else tuple(float(x) for x in given)
  if len(values) != len(default) or not np.isfinite(values).all():
    raise ValueError(
      f"expected {len(default)} finite numbers as {what}, got {given}"
    )
  if what == "std" and min(values) <= 0:
    raise ValueError(f"expected positive numbers as std, got {given}")
  return values
