"""Progress bars on a terminal's stderr; silence where stderr is none."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from roli_jax import distributed

Update = Callable[..., None]


@contextlib.contextmanager
def bar(description: str, total: int, start: int = 0) -> Iterator[Update]:
  """Shows a bar with the work done, a note, and the time left.

  Args:
    description: what is being done, a few words.
    total: how many units `update` advances by in all, >= 0.
    start: units done before, which don't count for the speed; default 0.

  Yields:
    `update(advance, note="")`: advances by so many units, and shows the note
    beside the bar.
  """
  import rich.console
  from rich import progress

  columns = (
    progress.TextColumn("{task.description}"),
    progress.BarColumn(bar_width=12),
    progress.MofNCompleteColumn(),
    progress.TextColumn("{task.fields[note]}"),
    progress.TimeRemainingColumn(),
  )
  with progress.Progress(
    *columns,
    console=rich.console.Console(stderr=True),
    transient=True,
    disable=not (sys.stderr.isatty() and distributed.leads()),
  ) as shown:
    task = shown.add_task(description, total=total, completed=start, note="")

    def update(advance: int, note: str = "") -> None:
      shown.update(task, advance=advance, note=note)

    yield update
