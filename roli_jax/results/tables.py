"""Tables as text: in Markdown, and in the terminal."""

import dataclasses
import statistics
import sys
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Table:
  """A table as text.

  Attributes:
    title: what it shows.
    header: the names of the columns.
    rows: lines of as many cells.
    note: what the reader has to know.
  """

  title: str
  header: tuple[str, ...]
  rows: Sequence[tuple[str, ...]]
  note: str = ""

  def markdown(self) -> str:
    """Returns the table under its title, its note below."""
    lines = [
      f"## {self.title}",
      "",
      "| " + " | ".join(self.header) + " |",
      "|" + " --- |" * len(self.header),
      *("| " + " | ".join(row) + " |" for row in self.rows),
    ]
    return "\n".join([*lines, "", *([self.note, ""] if self.note else [])])

  def _repr_markdown_(self) -> str:
    """Returns what a notebook shows."""
    return self.markdown()


def filled(tables: Iterable[Table]) -> list[Table]:
  """Returns the tables that have rows."""
  return [table for table in tables if table.rows]


def show(tables: Iterable[Table]) -> None:
  """Prints tables to the terminal."""
  import rich.console
  import rich.table

  # A file has no width; rich would take it for 80 columns.
  width = None if sys.stdout.isatty() else 160
  console = rich.console.Console(width=width, highlight=False, markup=False)
  for table in tables:
    shown = rich.table.Table(title=table.title, caption=table.note or None)
    for name in table.header:
      shown.add_column(name, overflow="fold")  # nothing is cut off
    for row in table.rows:
      shown.add_row(*row)
    console.print(shown)


def percent(value: float | int) -> str:
  """Returns a rate in [0, 1] in percent, with one decimal."""
  return f"{100 * value:.1f}"


def spread(values: Iterable[float | int]) -> str:
  """Returns mean ± standard deviation of rates, in percent; "" of none."""
  values = list(values)
  if not values:
    return ""
  mean = percent(statistics.mean(values))
  if len(values) < 2:
    return mean
  return f"{mean} ± {percent(statistics.stdev(values))}"
