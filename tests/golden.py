"""Checkpoints of other frameworks that anyone can make from names alone.

The value of a tensor depends on its key, its shape and the file's prefix.
"""

import functools
import hashlib
import json
import pathlib
import zlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "fixtures"
_EMBEDDINGS = (
  "pos_embed", "cls_token", "class_token", "pos_embedding", "class_embedding",
  "positional_embedding",
)  # fmt: skip


@functools.cache
def specs(folder: str = "backbones") -> dict:
  """What is known of each checkpoint, by its name."""
  return json.loads((FOLDER / folder / "keys.json").read_text())


@functools.cache
def arrays(name: str, folder: str = "backbones") -> dict[str, np.ndarray]:
  """The reference numbers of a checkpoint."""
  with np.load(FOLDER / folder / "golden.npz") as file:
    return {
      key.removeprefix(f"{name}/"): file[key]
      for key in file.files
      if key.startswith(f"{name}/")
    }


def _normal(name, shape):
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  return rng.standard_normal(tuple(shape))


def value(key: str, shape, dtype: str, prefix: str = "") -> np.ndarray:
  """A tensor as PyTorch lays it out."""
  leaf = key.rsplit(".", 1)[-1]
  if not dtype.startswith("float"):
    return np.zeros(shape, dtype)
  n = _normal(prefix + key, shape)
  if leaf in ("running_var", "threshold"):
    out = np.exp(0.1 * n)
  elif leaf == "running_mean":
    out = 0.1 * n
  elif leaf == "gamma":
    out = 0.3 + 0.1 * n
  elif leaf == "relative_position_bias_table":
    out = 0.5 * n
  elif leaf in _EMBEDDINGS or leaf.startswith("prompt"):
    out = 0.2 * n
  elif leaf.endswith("bias"):
    out = 0.05 * n
  elif len(shape) == 1:
    out = 1 + 0.1 * n
  elif len(shape) == 0:
    out = n
  else:
    out = n / np.sqrt(np.prod(shape[1:]))
  return np.asarray(out).astype(dtype)


def state_dict(spec: dict, dropped: bool = False) -> dict[str, np.ndarray]:
  """All tensors in file order; on request those too that a loader drops."""
  return {
    key: value(key, shape, dtype, spec["weight_prefix"])
    for key, shape, dtype, ignored in spec["keys"]
    if dropped or not ignored
  }


def images(spec: dict) -> np.ndarray:
  """Two images, float32 in [0, 1]."""
  rng = np.random.default_rng(spec["image_seed"])
  return rng.random((2, *spec["image_hw"], 3), np.float32)


def probe(spec: dict) -> np.ndarray:
  """The vector that features are multiplied with for a gradient."""
  name = f"probe:{spec['weight_prefix']}{spec['name']}"
  return _normal(name, (spec["feature_dim"],)).astype(np.float32)


def digest(state: dict[str, np.ndarray]) -> str:
  """Of all tensors with their names; equal bits, equal digests."""
  total = hashlib.sha256()
  for key, tensor in state.items():
    total.update(key.encode())
    total.update(tensor.tobytes())
  return total.hexdigest()[:16]
