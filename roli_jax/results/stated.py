"""Accuracies of weights as they are, beside those that are stated of them."""

from collections.abc import Sequence

from roli_jax import statistics
from roli_jax.results import record
from roli_jax.results.grouping import AS_IS, Attacked
from roli_jax.results.record import Row
from roli_jax.results.tables import Table, percent

# Their rows have one field more, which doesn't identify them.
FIELDS = (*record.FIELDS, "stated")
VALUES = record.VALUES | {"stated"}


def table(rows: Sequence[Row]) -> Table:
  """Returns each accuracy of weights that no run has trained.

  Corruptions are left out, which have a table of their own.
  """
  lines = [
    (
      row["weights"],
      row["backbone"],
      row["data"],
      Attacked.of(row).name,
      str(row["n"]),
      _with_interval(row["value"], row["n"]),
      *_beside(row["value"], row["stated"]),
    )
    for row in record.where(rows, stage=AS_IS)
    if not Attacked.of(row).is_corruption
  ]
  header = (
    "weights", "model", "data", "attack", "images", "accuracy [95% Wilson]",
    "stated", "ours − stated",
  )  # fmt: skip
  note = (
    "Percent. stated: of all test images, by those who published the weights or"
    " by RobustBench."
  )
  return Table("Weights as they are", header, lines, note)


def _with_interval(value: float, n: int) -> str:
  low, high = map(percent, statistics.wilson(round(value * n), n))
  return f"{percent(value)} [{low}, {high}]"


def _beside(value: float, stated: float | None) -> tuple[str, str]:
  if stated is None:
    return "", ""
  return f"{100 * stated:.2f}", f"{100 * (value - stated):+.2f}"
