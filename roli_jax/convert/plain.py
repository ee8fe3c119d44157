"""Files that hold arrays and nothing else: safetensors, and NumPy's .npz."""

import json
import math
import pathlib
import zipfile

import jax.numpy as jnp
import numpy as np

# What safetensors calls the kinds that NumPy itself lacks.
_LATER = {
  "BF16": "bfloat16",
  "F8_E4M3": "float8_e4m3fn",
  "F8_E4M3FNUZ": "float8_e4m3fnuz",
  "F8_E5M2": "float8_e5m2",
  "F8_E5M2FNUZ": "float8_e5m2fnuz",
  "F8_E8M0": "float8_e8m0fnu",
}
# Of a compressed .npz: more than weights ever gain, less than zeros could.
_MOST_GAINED = 100
_SMALL = 2**28


def safetensors(
  path: pathlib.Path,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """The tensors of a safetensors file, and its metadata.

  Raises:
    ValueError: it can't be read.
  """
  from safetensors import SafetensorError, safe_open

  try:
    with safe_open(path, "numpy") as file:
      kinds = {k: file.get_slice(k).get_dtype() for k in file.keys()}  # noqa: SIM118
      later = {k for k, kind in kinds.items() if kind in _LATER}
      tensors = {k: file.get_tensor(k) for k in kinds.keys() - later}
      metadata = file.metadata() or {}
  except (AttributeError, OSError, SafetensorError, TypeError) as error:
    raise ValueError(f"{path} can't be read: {error}") from error
  tensors |= _later(path, later)
  return {key: tensors[key] for key in kinds}, metadata


def _later(path: pathlib.Path, keys: set[str]) -> dict[str, np.ndarray]:
  """Those tensors of a file whose header has been found to be right."""
  if not keys:
    return {}
  raw = path.read_bytes()
  start = 8 + int.from_bytes(raw[:8], "little")
  header = json.loads(raw[8:start])
  return {
    key: np.frombuffer(
      raw,
      jnp.dtype(_LATER[header[key]["dtype"]]),
      math.prod(header[key]["shape"]),
      start + header[key]["data_offsets"][0],
    ).reshape(header[key]["shape"])
    for key in keys
  }


def widened(array: np.ndarray) -> np.ndarray:
  """The array in this machine's byte order, half precision as float32."""
  half = array.dtype in (np.float16, jnp.bfloat16)
  dtype = np.dtype(np.float32) if half else array.dtype.newbyteorder("=")
  return array.astype(dtype, copy=False)


def npz(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of a file of `numpy.savez`; nothing in it is unpickled.

  Raises:
    ValueError: it is broken, would grow out of proportion, or holds objects.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      size = sum(info.file_size for info in archive.infolist())
    if size > max(_MOST_GAINED * path.stat().st_size, _SMALL):
      raise ValueError(f"its arrays would have {size:,} bytes")
    with np.load(path, allow_pickle=False) as arrays:
      return dict(arrays)
  except Exception as error:  # bytes at random can raise anything
    raise ValueError(
      f"{path} is truncated or no .npz of arrays; get it anew"
      f" ({type(error).__name__}: {error!s:.80})"
    ) from error
