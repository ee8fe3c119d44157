"""Which layout a network's names are of, and which model its shapes."""

import dataclasses
import functools
import re
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from roli_jax import models, trees
from roli_jax.convert import resample
from roli_jax.convert.name_maps import LAYOUTS, TEXT, Layout
from roli_jax.convert.networks import Network
from roli_jax.types import Params

Shapes = dict[str, tuple[int, ...]]

_READ = (
  "convert.read(path) gives the arrays, and any JAX function of them can be"
  " attacked"
)


@dataclasses.dataclass(frozen=True)
class _Off:
  """The keys of tensors that are not as a model has them."""

  missing: tuple[str, ...]
  unexpected: tuple[str, ...]
  misshapen: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.missing) + len(self.unexpected) + len(self.misshapen)

  def __str__(self) -> str:
    sides = {
      "missing": self.missing,
      "unexpected": self.unexpected,
      "of another shape": self.misshapen,
    }
    return "; ".join(
      f"{len(keys)} {side}: {', '.join(keys[:2])}" + ", ..." * (len(keys) > 2)
      for side, keys in sides.items()
      if keys
    )


def marked(
  found: list[Network], model: str | None, format: str | None, what: str
) -> tuple[Network, Layout]:
  """The first network that bears the mark of a layout, and the layout.

  Args:
    found: those in the file.
    model: whose layouts count; None: those of all.
    format: the name of the file's format; None: told from its names.
    what: whose networks these are, for messages.

  Raises:
    ValueError: there is none.
  """
  known = [x for x in LAYOUTS if format is None or format in x.formats]
  if model is not None:
    backbone = models.create(model, 2).backbone
    known = [x for x in known if x.holds(backbone)]
    if not known:
      raise ValueError(f"{format} has no names for a {model}")
  for network in found:
    if own := [x for x in known if x in network.layouts]:
      return network, own[-1]
  if model is not None and format is not None:
    return found[0], known[0]  # told; what is missing is listed
  marks = [network for network in found if set(network.layouts) - {TEXT}]
  first = max(marks or found, key=lambda network: len(network.tensors))
  formats = sorted({x for layout in known for x in layout.formats})
  keys = ", ".join(list(first.tensors)[:4])
  raise ValueError(
    f"{what}: its keys ({keys}, ...) are of no layout of"
    f" {model or 'any model'} in {', '.join(formats)}; {instead(first)}"
  )


def told(layout: Layout, network: Network, pool: str | None, what: str) -> str:
  """The name of the model whose tensors these are, but for its head.

  Raises:
    ValueError: there is none; the message says which is nearest.
  """
  name, off = _nearest(network, layout, pool)
  if not len(off):
    return name
  hint = _unsupported(name, len(off), f" ({off})")
  raise ValueError(f"{what} has names of the layout {layout.name}; {hint}")


def instead(
  network: Network,
  layout: Layout | None = None,
  asked: models.Model | None = None,
) -> str:
  """What a network is that isn't the model that was asked for.

  One that has most of that model's tensors is not looked for among others.
  """
  own = [x for x in network.layouts if x is not TEXT]
  layout = layout or (own[-1] if own else _similar(network))
  if layout and asked:
    off = _off(network, layout, asked)
    if 2 * len(off) < len(network.tensors):
      return _unsupported(asked.name, len(off)) if len(off) else _READ
  if layout is None:
    return (
      "this architecture isn't supported; nearest is none of ours: all its"
      f" {len(network.tensors)} tensors have other names; {_READ}"
    )
  name, off = _nearest(network, layout)
  if len(off):
    return _unsupported(name, len(off), f" ({off})")
  return f"it is a {name} of the format {layout.formats[0]}"


def _unsupported(name: str, number: int, which: str = "") -> str:
  differ = f"{number} tensors differ" if number > 1 else "1 tensor differs"
  return (
    f"this architecture isn't supported; nearest is {name}, from which"
    f" {differ}{which}; {_READ}"
  )


def sized(
  layout: Layout, network: Network, name: str, pool: str | None
) -> tuple[models.Model, Shapes]:
  """The model that the network is of, and the shapes of its leaves.

  The width of its head, the size of its images, and what its feature is, are
  the network's.

  Raises:
    ValueError: a classifier that is no matrix; see `headed`.
  """
  head = layout.key("head/kernel")
  kernel = network.tensors.get(head, np.zeros((2, 2)))
  if kernel.ndim != 2:
    raise ValueError(f"expected {head} of two axes, got {kernel.shape}")
  width = max(kernel.shape[1 if head in layout.plain else 0], 2)
  model = headed(layout, name, width, network, pool)
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
  pool: str | None = None,
) -> models.Model:
  """The model under the kind of head that files of the layout hold.

  Args:
    layout: the network's layout of names.
    name: the model's name.
    width: the number of classes of the head.
    network: which tells of a ViT whether it has a class token, and whether its
      last normalisation is of the feature.
    pool: a name in `models.POOLS`; None: `token` where both are possible.

  Raises:
    ValueError: the model can't be pooled so.
  """
  model = _created(layout, name, width)
  if layout.pools:
    cls, late = (
      layout.key(f"backbone/{path}") in network.tensors
      for path in ("cls", "fc_norm/scale")
    )
    own = "token" if cls and not late else "mean"
    backbone = model.backbone.clone(pool=own, cls=cls, fc_norm=late)
    model = dataclasses.replace(model, backbone=backbone)
  elif pool == "mean":
    raise ValueError(
      f"pool=mean: names of the layout {layout.name} are not of models that are"
      " pooled so"
    )
  return models.with_options(model, pool=pool)


def _created(layout: Layout, name: str, width: int = 2) -> models.Model:
  projects = layout.kind == "clip"
  make = models.heads.projection if projects else models.heads.linear
  return dataclasses.replace(models.create(name, width), head=make(width))


@functools.cache
def shapes(model: models.Model) -> Shapes:
  """The shape of each leaf, parameters and statistics."""
  variables = jax.eval_shape(model.init, jax.random.key(0))
  return {k: tuple(v.shape) for k, v in leaves(*variables).items()}


def leaves(params: Params, stats: Any) -> dict[str, Any]:
  """The leaves by their paths, without what a method has added."""
  return trees.paths(
    {"backbone": params.backbone, "head": params.head, "stats": stats}
  )


def foreign_shapes(
  layout: Layout, keys: dict[str, list[str]], shapes: Shapes
) -> Shapes:
  """The shape of each foreign tensor, from those of our leaves."""
  zero = np.zeros((), np.int8)
  return {
    key: layout.outward(
      key, paths, [np.broadcast_to(zero, shapes[path]) for path in paths]
    ).shape
    for key, paths in keys.items()
  }


def _nearest(
  network: Network, layout: Layout, pool: str | None = None
) -> tuple[str, _Off]:
  """The model with the fewest tensors unlike a network's, and those."""
  offs: dict[str, _Off] = {}
  for name in models.MODELS:
    if not layout.holds(_created(layout, name).backbone):
      continue
    model = headed(layout, name, 2, network, pool)
    offs[name] = _off(network, layout, model)
    if not len(offs[name]):
      break
  name = min(offs, key=lambda name: len(offs[name]))
  return name, offs[name]


def _off(network: Network, layout: Layout, model: models.Model) -> _Off:
  """How a network differs from a model, but for head and size of images."""
  expected = shapes(model)
  keys = layout.keys(expected)
  free = {
    key
    for key, paths in keys.items()
    if paths[0].startswith("head/") or resample.can(paths[0])
  }
  theirs = foreign_shapes(layout, keys, expected)
  got = {
    key: tensor.shape
    for key, tensor in network.tensors.items()
    if not layout.drops(key)
  }
  return _Off(
    tuple(sorted(theirs.keys() - got.keys() - free)),
    tuple(sorted(got.keys() - theirs.keys())),
    tuple(
      sorted(
        key for key in got.keys() & theirs.keys() - free
        if got[key] != theirs[key]
      )
    ),
  )  # fmt: skip


def _similar(network: Network) -> Layout | None:
  """The layout that shares the most names with a network, by its toys."""
  have = _numberless(network.tensors)
  common = {}
  for layout in LAYOUTS:
    for name in [name for name in models.MODELS if name.startswith("glyph")]:
      model = _created(layout, name)
      if layout.holds(model.backbone):
        keys = layout.keys(shapes(model))
        common[layout.name] = len(have & _numberless(keys))
  best = max(common, key=lambda name: common[name])
  return next(x for x in LAYOUTS if x.name == best) if common[best] else None


def _numberless(keys: Iterable[str]) -> set[str]:
  return {re.sub(r"\d+", "0", key) for key in keys}
