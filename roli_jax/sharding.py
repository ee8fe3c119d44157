"""Where arrays live: batches split over the devices, parameters on each."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def mesh() -> Mesh:
  """All devices, along the axis `data`."""
  return Mesh(np.array(jax.devices()), ("data",))


def replicated(over: Mesh) -> NamedSharding:
  """The same values on each device."""
  return NamedSharding(over, PartitionSpec())


def split(over: Mesh) -> NamedSharding:
  """Equal parts of the leading axis, one a device."""
  return NamedSharding(over, PartitionSpec("data"))


def replicate(tree: Any, over: Mesh) -> Any:
  """The tree on every device of the mesh."""
  return jax.device_put(tree, replicated(over))


def shaped(shapes: Any, over: Mesh) -> Any:
  """The shapes as those of arrays that are on every device of the mesh."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(over)),
    shapes,
  )


def put(batch: Any, over: Mesh) -> Any:
  """This process's part of a batch, as its share of the global arrays."""
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(split(over), x), batch
  )


def check_batch(batch_size: int, over: Mesh) -> None:
  """Raises a ValueError unless the devices divide the batch."""
  if batch_size < 1 or batch_size % over.size:
    raise ValueError(
      f"batch_size must be a multiple of the {over.size} devices,"
      f" got {batch_size}"
    )
