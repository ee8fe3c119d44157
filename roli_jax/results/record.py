"""Rows on disk: one JSON object a line, appended, each entered once."""

import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from roli_jax import distributed

Row = dict[str, Any]

FIELDS = (
    "run", "cell", "stage", "init", "head_init", "method", "backbone",
    "weights", "data", "train_size", "lr", "steps", "split", "attack",
    "attack_steps", "restarts", "norm", "eps", "metric", "value", "n", "seed",
    "seconds",
)  # fmt: skip

# Fields that were measured; the others identify a row.
VALUES = frozenset({"run", "value", "n", "seconds"})


class Record:
  """A file of rows, in which no row stands twice.

  Two rows are the same if they agree in all fields but `values`; the one that
  was measured on more images, `n`, takes the other's place. A line that a
  killed process left unfinished is dropped when the file is next opened. Of
  several processes the first writes; all know the rows.

  Args:
    path: the file, which need not be there yet.
    fields: the names of a row's fields, in the order of the file.
    values: the fields that may differ between two rows that are the same.

  Attributes:
    rows: the rows of the file, in its order.
    watch: called after each row that is added; at first it does nothing.
  """

  def __init__(
    self,
    path: pathlib.Path,
    fields: tuple[str, ...] = FIELDS,
    values: frozenset[str] = VALUES,
  ):
    self.path = path
    self.watch: Callable[[], None] = lambda: None
    self._fields = fields
    self._identity = [field for field in fields if field not in values]
    whole, torn = _lines(path)
    if torn and distributed.leads():
      with path.open("rb+") as file:
        file.truncate(sum(len(line) for line in whole))
    self.rows: list[Row] = [json.loads(line) for line in whole]
    self._known = {self._key(row): i for i, row in enumerate(self.rows)}

  def __contains__(self, row: Mapping[str, Any]) -> bool:
    """Whether the row is there, of at least as many images as it says."""
    there = self._known.get(self._key(row))
    if there is None:
      return False
    return (self.rows[there].get("n") or 0) >= (row.get("n") or 0)

  def add(self, row: Mapping[str, Any]) -> None:
    """Adds the row unless it is there already; absent fields are null."""
    unknown = row.keys() - set(self._fields)
    assert not unknown, f"rows have no fields {sorted(unknown)}"
    whole = {field: _plain(row.get(field)) for field in self._fields}
    if whole in self:
      return
    key = self._key(whole)
    if key in self._known:
      self.rows[self._known[key]] = whole
      self._rewrite()
    else:
      self._known[key] = len(self.rows)
      self.rows.append(whole)
      self._append(whole)
    self.watch()

  def _append(self, row: Row) -> None:
    if distributed.leads():
      with self.path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")

  def _rewrite(self) -> None:
    """Writes all rows, the whole file or nothing."""
    if distributed.leads():
      partial = self.path.with_name(f"{self.path.name}.partial")
      lines = [json.dumps(row) + "\n" for row in self.rows]
      partial.write_text("".join(lines), encoding="utf-8")
      partial.replace(self.path)

  def _key(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(_plain(row.get(field)) for field in self._identity)


def _lines(path: pathlib.Path) -> tuple[list[bytes], bytes]:
  """The whole lines of a file, and what is left of a last one, b"" if none."""
  if not path.exists():
    return [], b""
  lines = path.read_bytes().splitlines(keepends=True)
  torn = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
  return lines, torn


def _plain(value: Any) -> Any:
  """The value as JSON has it: NumPy's as Python's, null if not finite."""
  if hasattr(value, "item"):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def read(path: pathlib.Path) -> list[Row]:
  """Returns the rows of a file, none if it isn't there; writes nothing."""
  return [json.loads(line) for line in _lines(path)[0]]


def directory(row: Mapping[str, Any]) -> str:
  """Returns where the stage of a row has its files, below a run's folders."""
  return f"{row['cell']}/{row['stage']}/lr{row['lr']:g}-steps{row['steps']}"


def where(rows: Iterable[Row], **fields: Any) -> list[Row]:
  """Returns the rows that have these values in these fields."""
  return [r for r in rows if all(r[k] == v for k, v in fields.items())]
