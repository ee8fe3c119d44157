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
    about: what entries will be of, plain values. What an older version didn't
      write is not compared.
    older: what it wrote beside, which is not written any more.

  Raises:
    ValueError: the directory holds entries of something else, or can't be
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
    """All entries of that name, in their order.

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
    """Another entry of that name."""
    if self.path is not None and distributed.leads():
      count = len(self._files(name))
      _write(self.path / f"{name}-{count:06d}.npz", arrays)

  def filter(self, chosen: Callable[[Mapping[str, Any]], np.ndarray]) -> None:
    """Keeps of each entry's jobs only those that a mask chooses."""
    if self.path is None or not distributed.leads():
      return
    for file in sorted(self.path.glob("*-[0-9]*.npz")):
      with np.load(file, allow_pickle=False) as arrays:
        entry = dict(arrays)
      if "rows" in entry:
        mask = chosen(entry)
        of_jobs = {
          name: value[mask]
          for name, value in entry.items()
          if name not in ("work", "adv")
        }
        _write(file, {**entry, **of_jobs})

  def _files(self, name):
    if self.path is None:
      return []
    digits = "[0-9]" * 6
    return sorted(self.path.glob(f"{glob.escape(name)}-{digits}.npz"))


def _write(file, arrays):
  partial = file.with_suffix(".partial")
  with partial.open("wb") as out:
    np.savez(out, **arrays)
  partial.replace(file)


def digest(*arrays: Any) -> str:
  """A hash of what the arrays hold; keys count as their data."""
  total = hashlib.sha256()
  for array in arrays:
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
      array = jax.random.key_data(array)
    array = np.ascontiguousarray(array)
    total.update(f"{array.dtype}{array.shape}".encode())
    total.update(array.tobytes())
  return total.hexdigest()[:16]


def _check_same(path, theirs, ours):
  """Raises a ValueError; what only one of the two says is not compared."""
  ours = json.loads(json.dumps(ours))
  for name in sorted(theirs.keys() & ours.keys()):
    if theirs[name] != ours[name]:
      raise ValueError(
        f"{path} holds progress of another evaluation: its {name} is"
        f" {theirs[name]}, not {ours[name]}. Give another directory."
      )
