"""State dicts of other frameworks: to our trees, and back."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from roli_jax import models, specs, trees
from roli_jax.convert import bundle as bundles
from roli_jax.convert import naming, networks
from roli_jax.convert.bundle import Bundle, Coverage
from roli_jax.convert.name_maps import FORMATS, LAYOUTS, Layout
from roli_jax.convert.networks import COUNTER, Network

# Formats of many networks that differ in it: naming one settles nothing.
_OF_ANY_NORMALISATION = ("meta", "robustbench")

OF_FILE = "of the file"  # `Coverage.normalised_by` of a file that holds them


def to_bundle(
  source: Any,
  model: str | None = None,
  format: str | None = None,
  mean: Sequence[float | int] | None = None,
  std: Sequence[float | int] | None = None,
  num_classes: int | None = None,
  image_size: int | None = None,
  pool: str | None = None,
  key: str | None = None,
  what: str = "the state dict",
  **told: Any,
) -> Bundle:
  """Returns the bundle of a state dict; see `convert.load`.

  `told` are sizes of a family, by name.

  Raises:
    ValueError: tensors that are missing, left over, of another shape, of a
      dtype that no weights have or not finite; a layout or a model that is
      not recognised; no such network. Both sides are listed.
  """
  _check_words(model, format, pool)
  found = networks.find(source, what, key)
  network, layout = naming.marked(found, model, format, what)
  if network.name:
    what = f"{what}, {network.name}"
  if others := networks.named(_others(found, network)):
    what = f"{what} (key= takes another: {others})"
  needed = layout.needed(network.tensors)
  bundles.check_arrays(needed, what)
  name = model or naming.identify(layout, network, pool, told, what)
  whole, expected = naming.sized(layout, network, name, pool, told)
  keys = _keys(layout, network, whole, num_classes, what)
  leaves = tree(layout, keys, expected, network.tensors)
  named = format or layout.formats[0]
  bundle = Bundle(
    whole,
    bundles.params_of(leaves),
    leaves.get("stats", {}),
    layout.name,
    network.extras,
  )
  both = _normalisation(whole, network, FORMATS[named], mean, std)
  bundle, resampled = bundles.fitted(bundle, *both, num_classes, image_size)
  dropped = _of_head(keys) if num_classes is not None else set()
  coverage = Coverage(
    layout=layout.name,
    wrapped=network.name,
    used=tuple(k for k in keys if k not in dropped),
    resampled=tuple(k for k, p in keys.items() if set(p) & set(resampled)),
    dropped=tuple(sorted(dropped)),
    ignored=tuple(sorted({*network.tensors.keys() - needed, *network.extras})),
    normalised_by=_normalised_by(
      mean is not None and std is not None, network, format, named
    ),
    others=others,
  )
  return dataclasses.replace(bundle, coverage=coverage)


def _others(found: list[Network], network: Network) -> list[Network]:
  """Returns those that could be meant in its place: with a matrix at least."""
  return [
    other
    for other in found
    if other is not network
    and any(tensor.ndim > 1 for tensor in other.tensors.values())
  ]


def _check_words(
  model: str | None, format: str | None, pool: str | None
) -> None:
  """Raises a ValueError unless the names are of a model, format and pool."""
  pools = dict.fromkeys(models.POOLS)
  tables: tuple[tuple[Mapping[str, Any], str | None, str], ...] = (
    ({**models.MODELS, **models.FAMILIES}, model, "model"),
    (FORMATS, format, "format"),
    (pools, pool, "pool"),
  )
  for table, word, what in tables:
    if word is not None:
      specs.lookup(table, word, what)


def _keys(
  layout: Layout,
  network: Network,
  model: models.Model,
  num_classes: int | None,
  what: str,
) -> dict[str, list[str]]:
  """Returns the network's keys and the leaves that each of them stands for.

  Raises:
    ValueError: tensors that are missing, left over or of another shape; no
      classifier, where no other is asked for.
  """
  expected = naming.shapes(model)
  keys = layout.keys(expected)
  headless = not _of_head(keys) & network.tensors.keys()
  if headless:
    keys = {key: keys[key] for key in keys if key not in _of_head(keys)}
  needed = layout.needed(network.tensors)
  got = {key: tensor.shape for key, tensor in needed.items()}
  theirs = naming.foreign_shapes(layout, keys, expected)
  try:
    trees.check_shapes(got, theirs, f"{what}, {layout.name}")
  except ValueError as error:
    hint = naming.instead(network, layout, model)
    raise ValueError(f"{error}; {hint}") from error
  if headless and num_classes is None:
    raise ValueError(
      f"{what} has no classifier {layout.key('head/kernel')!r}: say of how many"
      " classes a new one shall be (num_classes)"
    )
  return keys


def _of_head(keys: Mapping[str, list[str]]) -> set[str]:
  """Returns the keys, of those and their leaves, that are the classifier's."""
  return {key for key, paths in keys.items() if paths[0].startswith("head/")}


def _normalisation(
  model: models.Model,
  network: Network,
  usual: tuple[Sequence[float], Sequence[float]] | None,
  mean: Sequence[float | int] | None,
  std: Sequence[float | int] | None,
) -> tuple[Sequence[float | int], Sequence[float | int]]:
  """Returns mean and deviation: as given, the file's, the format's, or usual.

  Args:
    model: whose own mean and deviation are taken last.
    network: whose file may hold them, perhaps one number for all channels.
    usual: those of the format, taken if it has as many channels.
    mean: the given mean, or None.
    std: the given deviation, or None.
  """
  if usual is None or len(usual[0]) != model.channels:
    usual = (model.mean, model.std)
  return (
    _chosen(mean, network.mean, usual[0]),
    _chosen(std, network.std, usual[1]),
  )


def _chosen(
  given: Sequence[float | int] | None,
  theirs: tuple[float, ...] | None,
  usual: Sequence[float],
) -> Sequence[float | int]:
  """Returns the first that is not None, one number a channel."""
  if given is not None:
    return given
  if theirs is None:
    return usual
  return theirs * len(usual) if len(theirs) == 1 else theirs


def _normalised_by(
  told: bool,
  network: Network,
  given: str | None,
  format: str,
) -> str:
  """Returns where mean and deviation are from, in words.

  Args:
    told: whether both were given.
    network: whose file may hold them.
    given: the given format, whose own images are then meant, or None.
    format: that format, or the one that was recognised.
  """
  if told:
    return "as given"
  if network.mean is not None:
    return OF_FILE
  if given and FORMATS[given] and given not in _OF_ANY_NORMALISATION:
    return f"those of {given}, as given"
  return f"of the format {format}: check that they are the file's"


def tree(
  layout: Layout,
  keys: dict[str, list[str]],
  shapes: dict[str, tuple[int, ...]],
  tensors: Mapping[str, np.ndarray],
) -> dict[str, Any]:
  """Returns the leaves that tensors hold, as a tree.

  Args:
    layout: of the names of the tensors.
    keys: for each tensor its leaves' paths, as `Layout.keys` returns them.
    shapes: the leaves' shapes, by path.
    tensors: at least those of `keys`.
  """
  leaves: dict[str, np.ndarray] = {}
  for key, paths in keys.items():
    each = layout.inward(key, paths, tensors[key], [shapes[p] for p in paths])
    leaves.update(zip(paths, each, strict=True))
  return trees.unpaths(leaves)


def to_state_dict(bundle: Bundle, format: str) -> dict[str, np.ndarray]:
  """Returns the bundle under the names of a format; `to_bundle` undoes it.

  Where a format has more than one layout, it is the one that the bundle came
  from, or the newest.

  Args:
    bundle: without what a method has added.
    format: a name in `convert.FORMATS`.

  Raises:
    ValueError: the format has no names for this model, or for what a method
      has added to it.
  """
  specs.lookup(FORMATS, format, "format")
  backbone = bundle.model.backbone
  known = [x for x in LAYOUTS if format in x.formats and x.holds(backbone)]
  if not known:
    raise ValueError(f"{format} has no names for a {bundle.model.name}")
  if getattr(backbone, "pool", "") == "mean":
    known = [layout for layout in known if layout.pools]
  if not known:
    raise ValueError(
      f"{format} has no ViT whose feature is a mean; this {bundle.model.name}"
      " is one"
    )
  if bundle.params.peft:
    raise ValueError(
      f"{format} has no names for {list(trees.paths(bundle.params.peft))[:2]};"
      " merge what the method has added first"
    )
  layout = next((x for x in known if x.name == bundle.layout), known[0])
  if layout.flax and backbone.width != 64 * backbone.num_heads:
    raise ValueError(
      f"{format} has 64 channels a head; this {bundle.model.name} has"
      f" {backbone.width // backbone.num_heads}"
    )
  if isinstance(bundle.model.head, models.heads.Cosine):
    raise ValueError(f"{format} has no names for a zero-shot head")
  params, head = bundle.params, bundle.params.head
  if "kernel" in head and "bias" not in head and not layout.projects:
    zeros = np.zeros(bundle.model.num_classes, np.float32)
    params = dataclasses.replace(params, head={**head, "bias": zeros})
  if getattr(backbone, "distilled", False) and "kernel" in params.head:
    params = dataclasses.replace(params, head=models.heads.pair(params.head))
  arrays = {
    path: np.asarray(leaf)
    for path, leaf in naming.leaves(params, bundle.stats).items()
  }
  state = {
    key: layout.outward(key, paths, [arrays[path] for path in paths])
    for key, paths in layout.keys(arrays).items()
  }
  for key in [k for k in state if k.endswith(".running_var")]:
    counter = key.replace("running_var", COUNTER)
    if key.replace("running_var", "weight") not in state:
      continue  # no batch normalisation, which alone counts
    state[counter] = bundle.extras.get(counter, np.zeros((), np.int64))
  if format != "roli":
    return state
  # A Sequential of resizing (or not), normalisation and the network.
  numbers = re.findall(r"\b(\d+)\.mean\b", " ".join(bundle.extras))
  first = numbers[0] if numbers else "0"
  return {
    f"{first}.mean": np.array(bundle.model.mean, np.float32),
    f"{first}.std": np.array(bundle.model.std, np.float32),
    **{f"{int(first) + 1}.{key}": value for key, value in state.items()},
  }


def format_of(bundle: Bundle) -> str:
  """Returns the main format of the layout that the bundle came from.

  Of a bundle that came from no file of another framework it is the first format
  that has names for its model.

  Raises:
    ValueError: none has.
  """
  backbone = bundle.model.backbone
  known = [x for x in LAYOUTS if x.name == bundle.layout] or [
    x
    for x in LAYOUTS
    if x.holds(backbone)
    and (x.pools or getattr(backbone, "pool", "") != "mean")
  ]
  if not known:
    raise ValueError(f"no format has names for a {bundle.model.name}")
  return known[0].formats[0]
