"""The journal of an evaluation: how far it is, one small file a piece.

Training resumes from its checkpoints, in `experiment/train_stage.py`.
"""

import glob
import hashlib
import json
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from roli_jax import distributed
from roli_jax.files import workdir


class Journal:
  """A directory of numbered entries, each of which is whole or not there.

  Args:
    path: the directory; None keeps nothing.
    about: plain values that tell this evaluation from others. Those that an
      older version did not write are not compared.
    older: plain values that only an older version wrote; compared where they
      are there.

  Raises:
    ValueError: the directory holds entries of another evaluation, or can't be
      written to.
  """

  def __init__(
    self,
    path: pathlib.Path | None,
    about: Mapping[str, Any],
    older: Mapping[str, Any],
  ):
    self.path = path
    if path is None:
      return
    file = path / "about.json"
    try:
      path.mkdir(parents=True, exist_ok=True)
      if file.exists():
        theirs = json.loads(file.read_text())
        if not isinstance(theirs, dict) or "attack" not in theirs:
          raise ValueError(f"{file} says nothing of an evaluation")
        _check_same(path, theirs, {**about, **older})
      else:
        workdir.write_json(file, about)
    except json.JSONDecodeError as error:
      raise ValueError(f"{file} is damaged: {error}") from error
    except OSError as error:
      raise ValueError(f"{path} can't be written to: {error}") from error

  def entries(self, name: str) -> Iterator[dict[str, np.ndarray]]:
    """Yields all entries of that name, in their order.

    Raises:
      ValueError: one of them is damaged.
    """
    for file in self._files(name):
      try:
        with np.load(file, allow_pickle=False) as arrays:
          yield dict(arrays)
      except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
          f"{file} is damaged: {error}. Delete it, and its work is done again."
        ) from error

  def add(self, name: str, **arrays: Any) -> None:
    """Writes one more entry of that name; of several processes the first."""
    if self.path is not None and distributed.leads():
      count = len(self._files(name))
      _write(self.path / f"{name}-{count:06d}.npz", arrays)

  def filter(self, chosen: Callable[[Mapping[str, Any]], np.ndarray]) -> None:
    """Drops jobs from all entries.

    Args:
      chosen: entry -> bool [jobs], which of its jobs stay.
    """
    if self.path is None or not distributed.leads():
      return
    for file in sorted(self.path.glob("*-[0-9]*.npz")):
      with np.load(file, allow_pickle=False) as arrays:
        entry = dict(arrays)
      if "rows" in entry:
        mask = chosen(entry)
        by_job = entry.keys() - {"work", "adv"}
        _write(file, {**entry, **{name: entry[name][mask] for name in by_job}})

  def _files(self, name: str) -> list[pathlib.Path]:
    if self.path is None:
      return []
    digits = "[0-9]" * 6
    return sorted(self.path.glob(f"{glob.escape(name)}-{digits}.npz"))


def _write(file: pathlib.Path, arrays: Mapping[str, Any]) -> None:
  """Writes the file whole or not at all."""
  partial = file.with_suffix(".partial")
  with partial.open("wb") as out:
    np.savez(out, **arrays)
  partial.replace(file)


def digest(*arrays: jax.Array | np.ndarray | np.generic) -> str:
  """Hashes arrays' types, shapes and values; returns 16 hexadecimal digits.

  Args:
    *arrays: arrays of jax or numpy; random keys count as their data.
  """
  total = hashlib.sha256()
  for array in arrays:
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
      assert isinstance(array, jax.Array), "numpy has no keys"
      array = jax.random.key_data(array)
    values = np.ascontiguousarray(array)
    total.update(f"{values.dtype}{values.shape}".encode())
    total.update(values.tobytes())
  return total.hexdigest()[:16]


def _check_same(
  path: pathlib.Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]
) -> None:
  """Raises a ValueError if a value that both have differs."""
  ours = json.loads(json.dumps(ours))
  for name in sorted(theirs.keys() & ours.keys()):
    if theirs[name] != ours[name]:
      raise ValueError(
        f"{path} holds progress of another evaluation: its {name} is"
        f" {theirs[name]}, not {ours[name]}. Give another directory."
      )
