"""The files of a run's rows, open, and followed by the run's trackers."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from roli_jax import distributed
from roli_jax.results import record, trackers
from roli_jax.results.trackers import check

__all__ = ["check", "opened"]

_LOG_FIELDS = (
    "cell", "stage", "lr", "steps", "step", "split", "attack", "metric",
    "value", "n",
)  # fmt: skip
_LOG_VALUES = frozenset({"value", "n"})

# By the name of the file: the fields of its rows, and those that are measured.
_FILES = {
  "results": (record.FIELDS, record.VALUES),
  "training": (_LOG_FIELDS, _LOG_VALUES),
}


@contextlib.contextmanager
def opened(
  config: Mapping[str, Any], path: pathlib.Path, *names: str
) -> Iterator[list[record.Record]]:
  """Opens files of rows; what is added to them goes to `config.track` too.

  Args:
    config: the run's, or one over it.
    path: the run's directory.
    *names: `results`, rows of tests; `training`, the log.

  Yields:
    The records, in the order of their names.
  """
  records = [
    record.Record(path / f"{name}.jsonl", *_FILES[name]) for name in names
  ]
  distributed.wait("records")  # all have read them: the first may write
  with trackers.following(path, config, records):
    yield records
