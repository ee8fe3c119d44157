"""Positions for images of another size than the weights were trained on.

Class tokens stay; a grid of positions, or a table of biases by relative
position, is resized bicubically with antialiasing, as timm does it for ViTs.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import models, trees
from roli_jax.types import Params

_RESIZED = ("positions", "relative_bias")


def can(path: str) -> bool:
  """Returns whether a leaf's shape depends on the size of the images."""
  return path.endswith(_RESIZED)


def native_size(backbone: Any, shapes: dict[str, tuple[int, ...]]) -> int:
  """Returns the side of images that leaves of these shapes are for; 0: any.

  Args:
    backbone: a ViT or Swin, whose patches and stages count.
    shapes: the leaves' shapes, by path.
  """
  for path, shape in shapes.items():
    if path.endswith("positions"):
      return math.isqrt(shape[-2]) * smallest(backbone)
  # A Swin's last stage is one window, and others may have larger ones.
  windows = [
    window(x) for k, x in shapes.items() if k.endswith("relative_bias")
  ]
  return min(windows) * smallest(backbone) if windows else 0


def window(table: tuple[int, ...]) -> int:
  """Returns the side of a Swin's windows, from the shape of their table."""
  return (math.isqrt(table[0]) + 1) // 2


def smallest(backbone: Any) -> int:
  """Returns the side of the smallest images that a ViT or Swin takes."""
  merges = len(getattr(backbone, "depths", "1")) - 1
  return backbone.patch * 2**merges


def to_size(
  model: models.Model, params: Params, image_size: int
) -> tuple[models.Model, Params, list[str]]:
  """Returns the model for images of another side, and the resized leaves.

  Args:
    model: any model.
    params: its parameters.
    image_size: the side that images are resized to, in pixels.

  Raises:
    ValueError: the backbone can't take images of that side.
  """
  model = dataclasses.replace(model, image_size=image_size)
  like, _ = model.shapes()
  shapes = {k: v.shape for k, v in trees.paths(like.backbone).items()}
  leaves = trees.paths(params.backbone)
  changed = [p for p, leaf in leaves.items() if leaf.shape != shapes[p]]
  backbone = trees.map_named(
    lambda path, leaf: _fit(leaf, shapes[path]) if path in changed else leaf,
    params.backbone,
  )
  params = dataclasses.replace(params, backbone=backbone)
  return model, params, [f"backbone/{path}" for path in changed]


def _fit(leaf: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Returns a leaf with its axis of places resized.

  Args:
    leaf: [..., tokens + side ** 2, d] or [side ** 2, d].
    shape: the shape to come, whose side is another.
  """
  old, new = math.isqrt(leaf.shape[-2]), math.isqrt(shape[-2])
  grid = leaf[..., leaf.shape[-2] - old * old :, :]
  resized = jax.image.resize(
    jnp.asarray(grid.reshape(old, old, -1)),
    (new, new, leaf.shape[-1]),
    "cubic",
    precision=jax.lax.Precision.HIGHEST,
  )
  before = leaf[..., : leaf.shape[-2] - old * old, :]
  after = np.asarray(resized).reshape(*leaf.shape[:-2], new * new, -1)
  return np.concatenate([before, after], -2)
