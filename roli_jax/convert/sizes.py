"""The sizes of a family that a network's tensors show."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from roli_jax import models
from roli_jax.convert import resample
from roli_jax.convert.name_maps import Layout
from roli_jax.convert.networks import Network

# The shape of a leaf by its path, () if there is no tensor of that name.
Shape = Callable[[str], tuple[int, ...]]


def complete(
  layout: Layout, network: Network, family: str, told: Mapping[str, Any]
) -> dict[str, Any]:
  """What is told of the model of a network, and of the rest what tensors show.

  Args:
    layout: the network's layout of names.
    network: its tensors.
    family: a name in `models.FAMILIES`, of the layout's.
    told: sizes by name, as `models.create` takes them.

  Raises:
    ValueError: a size that neither shows nor is told, as a ViT's heads.
  """
  found = {**read(layout, network, family), **told}
  takes = models.FAMILIES[family].attributes
  if lacking := ", ".join(name for name in takes if name not in found):
    have = ", ".join(f"{name}={value}" for name, value in found.items())
    raise ValueError(
      f"no tensor shows {lacking} of this {family} ({have}): say {lacking}=..."
    )
  return found


def read(layout: Layout, network: Network, family: str) -> dict[str, Any]:
  """The sizes that show in a network's tensors, by name.

  Args:
    layout: the network's layout of names.
    network: its tensors.
    family: a name in `models.FAMILIES`, of the layout's.
  """
  return _READERS[family](_shape_in(layout, network))


def depths(layout: Layout, network: Network) -> tuple[int, ...]:
  """The number of blocks of each stage of a residual network.

  Args:
    layout: a residual network's layout of names.
    network: its tensors.
  """
  return tuple(_stages(_shape_in(layout, network), "conv1/kernel"))


def windows(layout: Layout, network: Network) -> set[int]:
  """The sides of a Swin's windows that show, in tokens.

  Args:
    layout: a Swin's layout of names.
    network: its tensors.
  """
  return {
    resample.window(table) for table in _tables(_shape_in(layout, network))
  }


def _shape_in(layout: Layout, network: Network) -> Shape:
  """The shape of a leaf, from the tensor that holds it."""

  def shape(path: str) -> tuple[int, ...]:
    try:
      key = layout.key(path)
    except ValueError:  # the layout has names for as many stages only
      return ()
    tensor = network.tensors.get(key)
    is_kernel = path.endswith("/kernel")
    if tensor is None or (is_kernel and tensor.ndim != 4):
      return ()
    (leaf,) = layout.inward(key, [path], tensor, [tensor.shape])
    return leaf.shape

  return shape


def _count(shape: Shape, path: str) -> int:
  """How many there are of a path with a number in it, from 0."""
  numbers = itertools.count()
  return len([*itertools.takewhile(lambda i: shape(path.format(i)), numbers)])


def _stages(shape: Shape, leaf: str) -> list[int]:
  """The number of blocks of each stage, told by a leaf of a block."""
  path = f"backbone/stage{{}}/block{{}}/{leaf}"
  count = _count(shape, path.replace("block{}", "block0"))
  return [_count(shape, path.replace("{}", str(i), 1)) for i in range(count)]


def _patches(shape: Shape, path: str) -> dict[str, Any]:
  kernel = shape(path)
  if not kernel:
    return {}
  return {"patch": kernel[0], "channels": kernel[2], "width": kernel[3]}


def _vit(shape: Shape) -> dict[str, Any]:
  depth = _count(shape, "backbone/block{}/norm1/scale")
  return {**_patches(shape, "backbone/embed/kernel"), "depth": depth}


def _tables(shape: Shape) -> list[tuple[int, ...]]:
  """The shape of a table of biases of each stage of a Swin that has one."""
  path = "backbone/stage{}/block0/attn/relative_bias"
  stages = range(len(_stages(shape, "norm1/scale")))
  return [table for i in stages if (table := shape(path.format(i)))]


def _swin(shape: Shape) -> dict[str, Any]:
  return {
    **_patches(shape, "backbone/embed/kernel"),
    "depth": tuple(_stages(shape, "norm1/scale")),
    "heads": tuple(table[-1] for table in _tables(shape)),
  }


def _convnext(shape: Shape) -> dict[str, Any]:
  depth = _stages(shape, "gamma")
  gammas = [shape(f"backbone/stage{i}/block0/gamma") for i in range(len(depth))]
  return {
    **_patches(shape, "backbone/stage0/embed/kernel"),
    "width": tuple(gamma[-1] for gamma in gammas),
    "depth": tuple(depth),
  }


def _wrn(shape: Shape) -> dict[str, Any]:
  stem = shape("backbone/stem/kernel")
  first = shape("backbone/stage0/block0/conv1/kernel")
  blocks = _stages(shape, "conv1/kernel")
  if not (stem and first) or len(set(blocks)) > 1:  # no WRN, all equally deep
    return {}
  width = first[3] // 16
  return {"depth": 6 * blocks[0] + 4, "width": width, "channels": stem[2]}


_READERS: dict[str, Callable[[Shape], dict[str, Any]]] = {
  "vit": _vit,
  "swin": _swin,
  "convnext": _convnext,
  "wrn": _wrn,
  "dm_wrn": _wrn,
}
