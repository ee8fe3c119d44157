"""State dicts of other frameworks: to our trees, and back."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from roli_jax import models, specs, trees
from roli_jax.convert import bundle as bundles
from roli_jax.convert import naming, networks, resample
from roli_jax.convert.bundle import Bundle, Coverage
from roli_jax.convert.name_maps import FORMATS, LAYOUTS, Layout
from roli_jax.convert.networks import COUNTER, Network
from roli_jax.types import Params

# What neither names nor shapes tell, in words.
_POOL = (
  "pool=token: names don't tell whether a ViT's feature is the class token or,"
  " as under timm's global_pool='avg', fc_norm=False, the mean of the others"
  " (pool=mean)"
)


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
) -> Bundle:
  """A state dict as a bundle; see `convert.load`.

  Raises:
    ValueError: tensors that are missing, left over, of another shape, of a
      dtype that no weights have or not finite; a layout or a model that can't
      be told; no such network. Both sides are listed.
  """
  _check_words(model, format, pool)
  found = networks.find(source, what, key)
  network, layout = naming.marked(found, model, format, what)
  if network.name:
    what = f"{what}, {network.name}"
  if others := networks.named(_others(found, network)):
    what = f"{what} (key= takes another: {others})"
  needed = {k: v for k, v in network.tensors.items() if not layout.drops(k)}
  bundles.check_arrays(needed, what)
  name = model or naming.told(layout, network, pool, what)
  whole, expected = naming.sized(layout, network, name, pool)
  keys = _keys(layout, network, whole, num_classes, what)
  leaves = tree(layout, keys, expected, network.tensors)
  params = Params(
    backbone=leaves["backbone"], peft={}, head=leaves.get("head", {})
  )
  named = format or layout.formats[0]
  whole = _normalised(whole, network, FORMATS[named], mean, std)
  resampled: list[str] = []
  if image_size is not None:
    whole, params, resampled = resample.to_size(whole, params, image_size)
  dropped: list[str] = []
  if num_classes is not None:
    dropped = [k for k, paths in keys.items() if _of_head(paths)]
    whole = bundles.with_classes(whole, num_classes)
    params = dataclasses.replace(params, head=bundles.zero_head(whole))
  assumed = layout.pools and whole.backbone.pool == "token" and pool is None
  coverage = Coverage(
    layout=layout.name,
    wrapped=network.name,
    used=tuple(k for k in keys if k not in dropped),
    resampled=tuple(k for k, p in keys.items() if set(p) & set(resampled)),
    dropped=tuple(sorted(dropped)),
    ignored=tuple(sorted({*network.tensors.keys() - needed, *network.extras})),
    normalised_by=_normalised_by(mean, network, named),
    others=others,
    assumed=(_POOL,) if assumed else (),
  )
  return Bundle(
    whole, params, leaves.get("stats", {}), layout.name, network.extras,
    coverage,
  )  # fmt: skip


def _others(found: list[Network], network: Network) -> list[Network]:
  """Those that could be meant in its place: with a matrix at least."""
  return [
    x for x in found
    if x is not network and any(v.ndim > 1 for v in x.tensors.values())
  ]  # fmt: skip


def _check_words(model, format, pool):
  for registry, word, what in (
    (models.MODELS, model, "model"),
    (FORMATS, format, "format"),
    (dict.fromkeys(models.POOLS), pool, "pool"),
  ):
    if word is not None:
      specs.lookup(registry, word, what)


def _keys(
  layout: Layout,
  network: Network,
  model: models.Model,
  num_classes: int | None,
  what: str,
) -> dict[str, list[str]]:
  """The network's keys and the leaves that each of them stands for.

  Raises:
    ValueError: tensors that are missing, left over or of another shape; no
      classifier, where no other is asked for.
  """
  expected = naming.shapes(model)
  keys = layout.keys(expected)
  head = {key for key, paths in keys.items() if _of_head(paths)}
  headless = not head & network.tensors.keys()
  if headless:
    keys = {key: paths for key, paths in keys.items() if key not in head}
  got = {
    key: tensor.shape
    for key, tensor in network.tensors.items()
    if not layout.drops(key)
  }
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


def _of_head(paths: list[str]) -> bool:
  return paths[0].startswith("head/")


def _normalised(
  model: models.Model, network: Network, usual: Any, mean: Any, std: Any
) -> models.Model:
  """The model with what is given, or is the file's, the format's, its own.

  Args:
    model: whose images are meant.
    network: beside which the file's may stand, one for all channels perhaps.
    usual: mean and deviation of the format, or None.
    mean: what is given, or None.
    std: what the pixels are divided by; None: the format's own.

  Raises:
    ValueError: not as many numbers as channels, or not finite.
  """
  if usual is None or len(usual[0]) != model.channels:
    usual = (model.mean, model.std)
  both = []
  for given, theirs, default, what in (
    (mean, network.mean, usual[0], "mean"),
    (std, network.std, usual[1], "std"),
  ):
    if given is None and theirs is not None and len(theirs) == 1:
      theirs = theirs * model.channels
    chosen = theirs if given is None else given
    both.append(each_channel(chosen, default, what))
  return dataclasses.replace(model, mean=both[0], std=both[1])


def _normalised_by(mean: Any, network: Network, format: str) -> str:
  if mean is not None:
    return "as given"
  if network.mean is not None:
    return "of the file"
  return f"of the format {format}: check that they are the file's"


def tree(
  layout: Layout,
  keys: dict[str, list[str]],
  shapes: dict[str, tuple[int, ...]],
  tensors: Mapping[str, np.ndarray],
) -> dict[str, Any]:
  """The leaves that these keys stand for, as a tree."""
  leaves: dict[str, np.ndarray] = {}
  for key, paths in keys.items():
    each = layout.inward(key, paths, tensors[key], [shapes[p] for p in paths])
    leaves.update(zip(paths, each, strict=True))
  return trees.unpaths(leaves)


def to_state_dict(bundle: Bundle, format: str) -> dict[str, np.ndarray]:
  """The bundle under the names of a format, which is undone by `to_bundle`.

  Of a format with more than one layout, the one that the bundle came from, or
  the newest.

  Raises:
    ValueError: the format has no names for this model, or for what a method
      has added to it.
  """
  specs.lookup(FORMATS, format, "format")
  known = [
    layout for layout in LAYOUTS
    if format in layout.formats and layout.holds(bundle.model.backbone)
  ]  # fmt: skip
  if not known:
    raise ValueError(f"{format} has no names for a {bundle.model.name}")
  if getattr(bundle.model.backbone, "pool", "") == "mean":
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
  arrays = {
    path: np.asarray(leaf)
    for path, leaf in naming.leaves(bundle.params, bundle.stats).items()
  }
  state = {
    key: layout.outward(key, paths, [arrays[path] for path in paths])
    for key, paths in layout.keys(arrays).items()
  }
  for key in [k for k in state if k.endswith(".running_var")]:
    counter = key.replace("running_var", COUNTER)
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
  """The main format of the layout that the bundle came from."""
  return next(x.formats[0] for x in LAYOUTS if x.name == bundle.layout)


def each_channel(
  given: Sequence[float | int] | None, otherwise: tuple[float, ...], what: str
) -> tuple[float, ...]:
  """What is given, one number a channel.

  Raises:
    ValueError: as many numbers as `otherwise` has were expected; a deviation
      that is not positive.
  """
  values = otherwise if given is None else tuple(float(x) for x in given)
  if len(values) != len(otherwise) or not np.isfinite(values).all():
    raise ValueError(
      f"expected {len(otherwise)} finite numbers as {what}, got {given}"
    )
  if what == "std" and min(values) <= 0:
    raise ValueError(f"expected positive numbers as std, got {given}")
  return values
