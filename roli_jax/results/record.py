"""Rows on disk: one JSON object a line, appended, each said once."""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from roli_jax import distributed

FIELDS = (
    "run", "cell", "stage", "init", "head_init", "method", "backbone",
    "weights", "data", "train_size", "lr", "steps", "split", "attack",
    "attack_steps", "restarts", "norm", "eps", "metric", "value", "n", "seed",
    "seconds",
)  # fmt: skip

# What a row says, as against what it is about.
SAID = frozenset({"run", "value", "n", "seconds"})


class Record:
  """An append-only file of rows, in which no row stands twice.

  Two rows are the same if they agree in all but what they say. A line that a
  killed process left unfinished is dropped when the file is next opened. Of
  several processes the first writes; all know the rows.
  """

  def __init__(
    self,
    path: pathlib.Path,
    fields: tuple[str, ...] = FIELDS,
    said: frozenset[str] = SAID,
  ):
    self.path = path
    self._fields = fields
    self._said = said
    whole, torn = _lines(path)
    if torn and distributed.leads():
      with path.open("rb+") as file:
        file.truncate(sum(len(line) for line in whole))
    self.rows: list[dict[str, Any]] = [json.loads(line) for line in whole]
    self._known = {self._key(row) for row in self.rows}

  def __contains__(self, row: Mapping[str, Any]) -> bool:
    return self._key(row) in self._known

  def add(self, row: Mapping[str, Any]) -> None:
    """Appends the row unless it stands there already; null where unsaid."""
    unknown = row.keys() - set(self._fields)
    assert not unknown, f"rows have no fields {sorted(unknown)}"
    whole = {field: _plain(row.get(field)) for field in self._fields}
    if self._key(whole) in self._known:
      return
    if distributed.leads():
      with self.path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(whole) + "\n")
    self.rows.append(whole)
    self._known.add(self._key(whole))

  def _key(self, row):
    about = [f for f in self._fields if f not in self._said]
    return tuple(_plain(row.get(f)) for f in about)


def _lines(path: pathlib.Path) -> tuple[list[bytes], bytes]:
  if not path.exists():
    return [], b""
  lines = path.read_bytes().splitlines(keepends=True)
  torn = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
  return lines, torn


def _plain(value: Any) -> Any:
  """Numbers that JSON has; what is not finite is null."""
  if hasattr(value, "item"):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a file, none if it isn't there. Nothing is written."""
  return [json.loads(line) for line in _lines(path)[0]]


def where(rows: Iterable[dict[str, Any]], **fields: Any) -> list[dict]:
  """The rows that have these values in these fields."""
  return [r for r in rows if all(r[k] == v for k, v in fields.items())]
