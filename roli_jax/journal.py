"""What has been done so far, on disk, one small file after each piece."""

import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from roli_jax import processes, workdir


class Journal:
  """A directory of numbered entries, each of which is whole or not there.

  Attributes:
    path: the directory; None keeps nothing.
    about: what the entries are of, as it stands there.

  Args:
    path: the directory.
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
    self.path, self.about = path, dict(about)
    if path is None:
      return
    file = path / "about.json"
    try:
      path.mkdir(parents=True, exist_ok=True)
      if file.exists():
        self.about = json.loads(file.read_text())
        check_same(path, self.about, {**about, **older})
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


def check_same(
  path: pathlib.Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]
) -> None:
  """Raises the ValueError of a directory that holds something else.

  Args:
    path: the directory.
    theirs: what it holds.
    ours: what it should hold; what only one of the two says is not compared.
  """
  ours = json.loads(json.dumps(ours))
  for name in sorted(theirs.keys() & ours.keys()):
    if theirs[name] != ours[name]:
      raise ValueError(
        f"{path} holds progress of another evaluation: its {name} is"
        f" {theirs[name]}, not {ours[name]}. Give another directory."
      )
