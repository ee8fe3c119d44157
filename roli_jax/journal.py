"""What has been done so far, on disk, one small file after each piece."""

import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from roli_jax import processes, workdir


class Journal:
  """A directory of numbered entries, each of which is whole or not there.

  Args:
    path: the directory; None keeps nothing.
    about: what the entries are of, plain values.

  Raises:
    ValueError: the directory holds entries of something else, or can't be
      written to.
  """

  def __init__(self, path: pathlib.Path | None, about: Mapping[str, Any]):
    self.path = path
    if path is None:
      return
    file = path / "about.json"
    try:
      path.mkdir(parents=True, exist_ok=True)
      if file.exists():
        _check_same(path, json.loads(file.read_text()), about)
      else:
        workdir.write_json(file, about)
    except OSError as error:
      raise ValueError(f"{path} can't be written to: {error}") from error

  def entries(self, name: str) -> Iterator[dict[str, np.ndarray]]:
    """All entries of that name, in their order."""
    if self.path is not None:
      for file in sorted(self.path.glob(f"{name}-*.npz")):
        with np.load(file, allow_pickle=False) as arrays:
          yield dict(arrays)

  def add(self, name: str, **arrays: Any) -> None:
    """Another entry of that name."""
    if self.path is None or not processes.leads():
      return
    count = len(list(self.path.glob(f"{name}-*.npz")))
    partial = self.path / f"{name}.partial"
    with partial.open("wb") as file:
      np.savez(file, **arrays)
    partial.replace(self.path / f"{name}-{count:06d}.npz")


def digest(*arrays: np.ndarray) -> str:
  """A hash of what the arrays hold."""
  total = hashlib.sha256()
  for array in arrays:
    total.update(f"{array.dtype}{array.shape}".encode())
    total.update(np.ascontiguousarray(array).tobytes())
  return total.hexdigest()[:16]


def _check_same(path, theirs, ours):
  ours = json.loads(json.dumps(ours))
  for name in sorted(theirs.keys() | ours.keys()):
    a, b = theirs.get(name), ours.get(name)
    if a != b:
      raise ValueError(
        f"{path} holds progress of another evaluation: its {name} is {a}, not"
        f" {b}. Give another directory."
      )
