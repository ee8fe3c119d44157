"""Random keys by name: a root, streams from it, steps of a stream, images.

Every draw is `fold_in`ed from what it is for, never split in sequence: a new
consumer shifts no other's numbers, and an image's noise is its own whatever
the batch it stands in. The generator is threefry, whose draws under `vmap` do
not depend on the batch (those of rbg do).
"""

import zlib

import jax
import numpy as np

from roli_jax.types import Array, Int, Integer, Key, Keys


def root(seed: int) -> Key[Array, ""]:
  """Returns the key of a seed, >= 0."""
  return jax.random.key(seed, impl="threefry2x32")


def stream(
  key: Key[Array, ""], name: str, step: int | Int[Array, ""] = 0
) -> Key[Array, ""]:
  """Returns the key of a named purpose at a step, by default the first."""
  named = jax.random.fold_in(key, zlib.crc32(name.encode()))
  return jax.random.fold_in(named, step)


def per_image(
  key: Key[Array, ""], indices: Integer[Array | np.ndarray, " b"]
) -> Keys:
  """Returns one key for each image, from its index in the data set alone."""
  return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)


def fold(
  keys: Keys, data: str | int | Integer[Array, ""] | Integer[Array, " b"]
) -> Keys:
  """Returns each image's key for a purpose.

  Args:
    keys: one key an image.
    data: a name, a number for all images, or a number for each.
  """
  if isinstance(data, str):
    data = zlib.crc32(data.encode())
  each = 0 if getattr(data, "ndim", 0) else None
  return jax.vmap(jax.random.fold_in, (0, each))(keys, data)
