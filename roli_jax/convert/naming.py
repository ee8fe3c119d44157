"""Which layout a network's names are of, and which model its shapes."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from roli_jax import models, trees
from roli_jax.convert import resample, sizes
from roli_jax.convert.name_maps import LAYOUTS, TEXT, Layout
from roli_jax.convert.networks import Network
from roli_jax.types import Params, PyTree

Shapes = dict[str, tuple[int, ...]]

_READ = (
  "convert.read(path) gives the arrays, and any JAX function of them can be"
  " attacked"
)


# The keys of tensors that are not as a model has them, by what is wrong.
Faults = dict[str, list[str]]


def marked(
  found: list[Network], model: str | None, format: str | None, what: str
) -> tuple[Network, Layout]:
  """Returns the first network that bears the mark of a layout, and the layout.

  Args:
    found: the networks in the file.
    model: the model whose layouts count; None: those of all models.
    format: the name of the file's format; None: recognised by its names.
    what: the name of the file, for messages.

  Raises:
    ValueError: there is none.
  """
  known = [x for x in LAYOUTS if format is None or format in x.formats]
  if model is not None:
    known = [x for x in known if x.holds(_example(model))]
    if not known:
      raise ValueError(f"{format} has no names for a {model}")
  for network in found:
    if borne := [x for x in known if x in network.layouts]:
      return network, borne[-1]
  if model is not None and format is not None:
    return found[0], known[0]  # the caller lists what is missing
  marks = [network for network in found if set(network.layouts) - {TEXT}]
  first = max(marks or found, key=lambda network: len(network.tensors))
  formats = sorted({x for layout in known for x in layout.formats})
  keys = ", ".join(list(first.tensors)[:4])
  raise ValueError(
    f"{what}: its keys ({keys}, ...) are of no layout of"
    f" {model or 'any model'} in {', '.join(formats)}; {instead(first)}"
  )


def _example(name: str) -> Any:
  """Returns a backbone of that name; of a family, one without meaning."""
  if name not in models.FAMILIES:
    return models.create(name, 2).backbone
  family = models.FAMILIES[name]
  ones = {
    attribute: (1,) if size in family.staged else 1
    for size, attribute in family.attributes.items()
  }
  return family.module(**ones)


def identify(
  layout: Layout,
  network: Network,
  pool: str | None,
  told: Mapping[str, Any],
  what: str,
) -> str:
  """Returns the name of the model whose tensors these are, but for its head.

  That is a named model, or else a family; if sizes are told, a family.

  Raises:
    ValueError: there is none; the message says which is nearest.
  """
  family = next((k for k in models.FAMILIES if layout.holds(_example(k))), None)
  if told:
    if family:
      return family
    raise ValueError(
      f"{what} has names of the layout {layout.name}, whose models have their"
      f" sizes: it takes no {', '.join(told)}"
    )
  if family and (name := _of_sizes(family, layout, network, pool)):
    return name
  name, faults = _nearest(network, layout, pool)
  if not faults:
    return name
  hint = _unsupported(name, faults)
  raise ValueError(f"{what} has names of the layout {layout.name}; {hint}")


def _of_sizes(
  family: str, layout: Layout, network: Network, pool: str | None
) -> str:
  """Returns the named model of the sizes that tensors show, or the family.

  Returns "" if the family has no model of just these tensors, but for its head.
  """
  shown = sizes.read(layout, network, family)
  # A ViT's tensors are the same whatever the number of its heads.
  told = {"heads": 1, **shown} if family == "vit" else shown
  try:
    model = headed(layout, family, 2, network, pool, told)
  except ValueError:  # sizes that lack, or that can't be
    return ""
  if _faults(network, layout, model):
    return ""
  window = getattr(model.backbone, "window", None)
  for name in models.MODELS:
    named = models.create(name, 2)
    alike = getattr(named.backbone, "window", None) == window
    if alike and layout.holds(named.backbone):
      theirs = models.FAMILIES[family].sizes(named.backbone)
      if shown.items() <= {**theirs, "channels": named.channels}.items():
        return name
  return family


def instead(
  network: Network,
  layout: Layout | None = None,
  asked: models.Model | None = None,
) -> str:
  """Returns what a network is, if it isn't the model that was asked for.

  A network that has most of that model's tensors is not compared with others.

  Args:
    network: what was read.
    layout: its layout of names; None: that of the last mark, or the nearest.
    asked: the model that was asked for; None: any.
  """
  if layout is None:
    marks = [x for x in network.layouts if x is not TEXT]
    layout = marks[-1] if marks else _similar(network)
  if layout is None:
    return (
      "this architecture isn't supported; nearest is none of ours: all its"
      f" {len(network.tensors)} tensors have other names; {_READ}"
    )
  if asked:
    faults = _faults(network, layout, asked)
    if 2 * _count(faults) < len(network.tensors):
      return _unsupported(asked.name, faults, False) if faults else _READ
  name, faults = _nearest(network, layout)
  if faults:
    return _unsupported(name, faults)
  return f"it is a {name} of the format {layout.formats[0]}"


def _count(faults: Faults) -> int:
  return sum(map(len, faults.values()))


def _unsupported(name: str, faults: Faults, are_listed: bool = True) -> str:
  number = _count(faults)
  differ = f"{number} tensors differ" if number > 1 else "1 tensor differs"
  sides = "; ".join(
    f"{len(keys)} {side}: {', '.join(keys[:2])}" + ", ..." * (len(keys) > 2)
    for side, keys in faults.items()
  )
  return (
    f"this architecture isn't supported; nearest is {name}, from which"
    f" {differ}{f' ({sides})' if are_listed else ''}; {_READ}"
  )


def sized(
  layout: Layout,
  network: Network,
  name: str,
  pool: str | None,
  told: Mapping[str, Any],
) -> tuple[models.Model, Shapes]:
  """Returns the model of a network, and the shapes of its leaves.

  The width of its head, the size of its images and its pooling are the
  network's, and of a family the sizes that are not told.

  Raises:
    ValueError: a classifier that is no matrix; see `headed`, `sizes.complete`.
  """
  if name in models.FAMILIES:
    told = sizes.complete(layout, network, name, told)
  head = layout.key("head/kernel")
  kernel = network.tensors.get(head, np.zeros((2, 2)))
  if kernel.ndim != 2:
    raise ValueError(f"expected {head} of two axes, got {kernel.shape}")
  classes_last = layout.flax or head in layout.plain
  width = max(kernel.shape[1 if classes_last else 0], 2)
  model = headed(layout, name, width, network, pool, told)
  expected = shapes(model)
  have = {
    path: network.tensors[key].shape
    for key, paths in layout.keys(filter(resample.can, expected)).items()
    for path in paths
    if key in network.tensors and network.tensors[key].ndim >= 2
  }
  size = resample.native_size(model.backbone, have)
  if size in (0, model.image_size):
    return model, expected
  model = dataclasses.replace(model, image_size=size)
  return model, shapes(model)


def headed(
  layout: Layout,
  name: str,
  width: int,
  network: Network,
  pool: str | None,
  told: Mapping[str, Any],
) -> models.Model:
  """Returns the model under the kind of head that files of the layout hold.

  Args:
    layout: the network's layout of names.
    name: a name in `models.MODELS`.
    width: the number of classes of the head.
    network: its names show whether a ViT has a class token, and whether its
      last normalisation comes after pooling; its shapes a `swin`'s windows.
    pool: a name in `models.POOLS`; None: `token` where both are possible.
    told: what `models.create` is told of a family's sizes.

  Raises:
    ValueError: the model can't be pooled so, or be of those sizes.
  """
  model = _created(layout, name, width, told)
  if name == "swin":
    model = _windowed(model, sizes.windows(layout, network))
  if layout.pools:
    backbone = model.backbone.clone(**_shown(layout, network))
    model = dataclasses.replace(model, backbone=backbone)
    if backbone.distilled:
      head = models.heads.Pair(model.num_classes)
      model = dataclasses.replace(model, head=head)
  elif pool == "mean":
    raise ValueError(
      f"pool=mean: names of the layout {layout.name} are not of models that are"
      " pooled so"
    )
  return models.with_options(model, pool=pool)


def _windowed(model: models.Model, shown: set[int]) -> models.Model:
  """Returns a Swin whose stages have the windows that tensors show.

  They differ where the last map is smaller than a window; otherwise it is one.
  """
  if len(shown) < 2:
    return model
  backbone = model.backbone.clone(window=max(shown))
  side = min(shown) * resample.smallest(backbone)
  return dataclasses.replace(model, backbone=backbone, image_size=side)


def _shown(layout: Layout, network: Network) -> dict[str, Any]:
  """Returns the attributes of a ViT that its names and shapes show."""
  shape = {
    path: np.shape(network.tensors.get(layout.key(f"backbone/{path}"), 0))
    for path in (
      "cls", "dist", "registers", "positions", "block0/gamma1", "fc_norm/scale",
    )
  }  # fmt: skip
  cls, late = bool(shape["cls"]), bool(shape["fc_norm/scale"])
  number = shape["positions"][-2] if len(shape["positions"]) > 1 else 0
  return {
    "pool": "token" if cls and not late else "mean",
    "cls": cls,
    "fc_norm": late,
    "distilled": bool(shape["dist"]),
    "registers": shape["registers"][-2] if len(shape["registers"]) > 1 else 0,
    "scaled": bool(shape["block0/gamma1"]),
    # A square: each is a patch's.
    "cls_positions": not (cls or shape["registers"])
    or math.isqrt(number) ** 2 != number,
  }


def _created(
  layout: Layout, name: str, width: int, told: Mapping[str, Any]
) -> models.Model:
  make = models.heads.projection if layout.projects else models.heads.linear
  # Where it must be told, tensors tell the size of images later.
  must = name in models.FAMILIES and models.FAMILIES[name].image_size is None
  model = models.create(name, width, 1 if must else None, **told)
  if must:
    side = resample.smallest(model.backbone)
    model = dataclasses.replace(model, image_size=side)
  return dataclasses.replace(model, head=make(width))


@functools.cache
def shapes(model: models.Model) -> Shapes:
  """Returns the shape of each leaf, parameters and statistics, by path."""
  variables = model.shapes()
  return {k: tuple(v.shape) for k, v in leaves(*variables).items()}


def leaves(params: Params, stats: PyTree) -> dict[str, Any]:
  """Returns the leaves by their paths, without what a method has added."""
  return trees.paths(
    {"backbone": params.backbone, "head": params.head, "stats": stats}
  )


def foreign_shapes(
  layout: Layout, keys: dict[str, list[str]], shapes: Shapes
) -> Shapes:
  """Returns the shape of each foreign tensor, from those of our leaves.

  Args:
    layout: of the foreign names.
    keys: for each foreign name its leaves' paths.
    shapes: the leaves' shapes, by path.
  """
  zero = np.zeros((), np.int8)
  return {
    key: layout.outward(
      key, paths, [np.broadcast_to(zero, shapes[path]) for path in paths]
    ).shape
    for key, paths in keys.items()
  }


def _nearest(
  network: Network, layout: Layout, pool: str | None = None
) -> tuple[str, Faults]:
  """Returns the model with the fewest faults of a network, and those."""
  found: dict[str, Faults] = {}
  for name in _candidates(network, layout):
    model = headed(layout, name, 2, network, pool, {})
    found[name] = _faults(network, layout, model)
    if not found[name]:
      break
  return min(found.items(), key=lambda item: _count(item[1]))


def _candidates(network: Network, layout: Layout) -> list[str]:
  """Returns the models of a layout: of as many blocks, if there are any.

  Blocks are counted in no time, where a model's shapes take a second or more.
  """
  known = {name: _example(name) for name in models.MODELS}
  known = {name: x for name, x in known.items() if layout.holds(x)}
  if layout.family not in (models.ResNet, models.PreactResNet):
    return [*known]
  depths = sizes.depths(layout, network)
  return [name for name in known if known[name].depths == depths] or [*known]


def _faults(network: Network, layout: Layout, model: models.Model) -> Faults:
  """Returns how a network differs from a model.

  Its head and what depends on the size of its images are free.
  """
  expected = shapes(model)
  keys = layout.keys(expected)
  free = {
    key
    for key, paths in keys.items()
    if paths[0].startswith("head/") or resample.can(paths[0])
  }
  theirs = foreign_shapes(layout, keys, expected)
  needed = layout.needed(network.tensors)
  got = {key: tensor.shape for key, tensor in needed.items()}
  compared = got.keys() & theirs.keys() - free
  sides = {
    "missing": sorted(theirs.keys() - got.keys() - free),
    "unexpected": sorted(got.keys() - theirs.keys()),
    "of another shape": sorted(k for k in compared if got[k] != theirs[k]),
  }
  return {side: found for side, found in sides.items() if found}


def _similar(network: Network) -> Layout | None:
  """Returns the layout that shares the most names with a network, if any.

  Names are those of the glyph models, which are small, numbers left out.
  """
  have = _numberless(network.tensors)
  common: dict[Layout, int] = {}
  for layout in LAYOUTS:
    for name in [name for name in models.MODELS if name.startswith("glyph")]:
      model = _created(layout, name, 2, {})
      if layout.holds(model.backbone):
        keys = layout.keys(shapes(model))
        common[layout] = len(have & _numberless(keys))
  best = max(common, key=lambda layout: common[layout])
  return best if common[best] else None


def _numberless(keys: Iterable[str]) -> set[str]:
  return {re.sub(r"\d+", "0", key) for key in keys}
