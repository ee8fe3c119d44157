"""Where arrays live: which device of which process holds what.

Batches are split over the mesh's axis `data`. Parameters and what the optimizer
keeps of them are on each device, unless rules split them over `data` (FSDP) or
`model` (as Megatron does). The same program runs on one device, on those of one
process, and on those of several.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from roli_jax import trees

AXES = ("data", "model")


def mesh(model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a mesh with the axes `data` and `model`.

  Args:
    model: the number of devices along `model`, >= 1.
    devices: the devices; None: all that there are.

  Raises:
    ValueError: `model` doesn't divide the number of devices.
  """
  chosen = np.array(jax.devices() if devices is None else devices)
  if model < 1 or chosen.size % model:
    raise ValueError(
      f"mesh.model must divide the {chosen.size} devices, got {model}"
    )
  return Mesh(chosen.reshape(-1, model), AXES)


def replicated(over: Mesh) -> NamedSharding:
  """Returns the sharding that copies an array to each device."""
  return NamedSharding(over, PartitionSpec())


def split(over: Mesh) -> NamedSharding:
  """Returns the sharding that splits the leading axis along `data`."""
  return NamedSharding(over, PartitionSpec("data"))


def ruled(shapes: Any, over: Mesh, rules: Sequence[Any] = ()) -> Any:
  """Returns the shapes with shardings by rules.

  A rule is a pattern of paths, and how the leaves there are split: over an
  axis, along the largest dimension that it divides, or an axis or None for each
  dimension. The first rule counts whose pattern matches the end of a leaf's
  path, from a `/` on: the averages of an optimizer lie as the parameters they
  are of. What no rule names is on each device, and so are numbers, as an
  optimizer keeps one for each leaf, and a leaf that has no dimension for an
  axis given alone.

  Examples:
    >>> shapes = {"fc1": {"kernel": jax.ShapeDtypeStruct((8, 32), "float32")}}
    >>> rules = (("fc1/kernel", (None, "model")), (".*", "data"))
    >>> tuple(ruled(shapes, mesh(), rules)["fc1"]["kernel"].sharding.spec)
    (None, 'model')

  Args:
    shapes: a tree of `jax.ShapeDtypeStruct`.
    over: the mesh.
    rules: pairs of a pattern and an axis, or an axis or None for each
      dimension; (): every leaf is copied to each device.

  Raises:
    ValueError: a rule names an axis that the mesh lacks, or a dimension that
      the axis doesn't divide.
  """
  sizes = dict(over.shape)
  patterns = [(_compiled(rule, sizes), rule[1]) for rule in rules]

  def spec(name: str, shape: tuple[int, ...]) -> PartitionSpec:
    for pattern, axes in patterns if shape else ():
      if pattern.fullmatch(name):
        if isinstance(axes, str):
          return _along(shape, axes, sizes[axes])
        _check_divides(name, shape, axes, sizes)
        # One number for a whole dimension, as FTP keeps, is every device's.
        pairs = zip(shape, axes, strict=False)
        return PartitionSpec(*(axis if n > 1 else None for n, axis in pairs))
    return PartitionSpec()

  return trees.map_named(
    lambda name, x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(over, spec(name, x.shape))
    ),
    shapes,
  )


def _compiled(rule: Any, axes: Mapping[str, int]) -> re.Pattern[str]:
  """Returns the rule's pattern, for the ends of paths, or raises.

  Args:
    rule: as `ruled` takes them; anything a user may have written.
    axes: the sizes of the mesh's axes.
  """
  if isinstance(rule, str) or len(rule) != 2:
    raise ValueError(
      'mesh.rules is a tuple of pairs, as ((".*", "data"),); one of them is'
      f" {rule!r}"
    )
  pattern, named = rule
  for axis in (named,) if isinstance(named, str) else named:
    if axis is not None and axis not in axes:
      raise ValueError(
        f"mesh.rules: {pattern!r} names the axis {axis!r}; there are"
        f" {', '.join(axes)}"
      )
  try:
    return re.compile(rf"(?:.*/)?(?:{pattern})")
  except re.error as error:
    raise ValueError(
      f"mesh.rules: {pattern!r} is no pattern: {error}"
    ) from error


def _along(shape: tuple[int, ...], axis: str, size: int) -> PartitionSpec:
  """Splits the largest dimension that the axis divides, the last of equals."""
  fits = [(n, i) for i, n in enumerate(shape) if n % size == 0]
  if not fits:
    return PartitionSpec()
  _, at = max(fits)
  return PartitionSpec(*[None] * at, axis)


def _check_divides(
  name: str,
  shape: tuple[int, ...],
  axes: Sequence[str | None],
  sizes: Mapping[str, int],
) -> None:
  fits = len(axes) <= len(shape) and all(
    axis is None or n == 1 or n % sizes[axis] == 0
    for n, axis in zip(shape, axes, strict=False)
  )
  if not fits:
    raise ValueError(
      f"mesh.rules: {name} has the shape {shape}, which can't be split over"
      f" {axes} of {sizes}"
    )


def replicate(tree: Any, over: Mesh) -> Any:
  """Copies the tree to every device of the mesh."""
  return jax.tree.map(lambda x: _at(x, replicated(over)), tree)


def place(tree: Any, like: Any) -> Any:
  """Places the tree, the same in each process, as `like` is sharded."""
  return jax.tree.map(lambda x, to: _at(x, to.sharding), tree, like)


def _at(x: Any, where: Sharding) -> jax.Array:
  is_key = isinstance(x, jax.Array) and jax.dtypes.issubdtype(
    x.dtype, jax.dtypes.prng_key
  )
  if not is_key:
    return jax.device_put(x, where)
  # Keys themselves can't be put on other processes' devices.
  data = jax.device_put(jax.random.key_data(x), where)
  return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))


def put(batch: Any, over: Mesh) -> Any:
  """Returns global arrays of which each process gives its part of the rows."""
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(split(over), x), batch
  )


def spread(arrays: Any, over: Mesh) -> Any:
  """Splits the rows of arrays that each process has over the devices."""
  at = split(over)
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(x.shape, at, lambda i: x[i]), arrays
  )


def fetch(tree: Any) -> Any:
  """Returns the whole arrays, as NumPy, in every process."""

  def whole(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable or x.is_fully_replicated:
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(whole, tree)


def check_batch(batch_size: int, over: Mesh) -> None:
  """Raises a ValueError unless the devices divide the batch."""
  size = over.shape["data"]
  if batch_size < 1 or batch_size % size:
    raise ValueError(
      "batch_size (a part of it, with accumulate) must be a multiple of the"
      f" {size} devices{' along data' * (size < over.size)}, got {batch_size}"
    )
