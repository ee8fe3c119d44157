"""`report.html`: a run or a sweep on one page that needs nothing beside it.

`answers` says what is read first and `intervals` draws it, `gallery` brings the
images that tests have kept, `plots` draws curves by plotly, `table` writes
tables; here they become a page, with the script that sorts, filters, slides.
"""

import html
import json
import pathlib
import string
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from roli_jax.evaluate.checks import VERDICTS
from roli_jax.files import extras, workdir
from roli_jax.results import record
from roli_jax.results.grouping import by_run
from roli_jax.results.page import answers, gallery, intervals, plots, table
from roli_jax.results.record import Row
from roli_jax.results.tables import Table

MOST_BYTES = 20_000_000  # of a page
_REST = 1_000_000  # of them for all but plotly's script and the gallery


def write(path: pathlib.Path, tables: Sequence[Table]) -> pathlib.Path:
  """Writes `report.html` of a run, or of a sweep with runs below it.

  Args:
    path: the directory, with `results.jsonl` in it.
    tables: those of its report.

  Returns:
    The file.
  """
  extras.need("plotly", "PIL")
  from plotly import offline

  rows = record.read(path / "results.jsonl")
  runs = _runs(path, rows)
  script = offline.get_plotlyjs()
  best = answers.answers(rows)
  shown = gallery.collect(
    {name: path / name for name in runs},
    best,
    MOST_BYTES - len(script) - _REST,
  )
  logs = {name: record.read(path / name / "training.jsonl") for name in runs}
  folder = resources.files(__package__)
  parts = {
    "title": html.escape(path.resolve().name),
    "about": html.escape(_about(rows)),
    "answer": intervals.answers(best) + _checks(tables),
    "radius": plots.as_html(plots.by_radius(rows)),
    "training": plots.as_html(plots.training(runs, logs)),
    "differences": intervals.differences(tables),
    "tables": "\n".join(map(table.as_html, tables)),
    "gallery": html.escape(shown.note),
    "data": _plain(shown.data),
    "plotly": script,
    "style": folder.joinpath("style.css").read_text(),
    "script": folder.joinpath("script.js").read_text(),
  }
  template = folder.joinpath("template.html").read_text()
  partial = path / "report.html.partial"
  partial.write_text(string.Template(template).substitute(parts))
  return partial.replace(path / "report.html")


def _runs(path: pathlib.Path, rows: Sequence[Row]) -> Mapping[str, list[Row]]:
  """Returns the rows of each run by its directory below this one."""
  names = workdir.swept(path)
  if not names:
    return {"": list(rows)}
  return {name: record.where(rows, run=name) for name in names}


def _about(rows: Sequence[Row]) -> str:
  """Returns what was measured on, in a line."""
  names = {
    field: ", ".join(sorted({str(row[field]) for row in rows}))
    for field in ("backbone", "data")
  }
  runs = len(by_run(rows))
  seeds = len({row["seed"] for row in rows})
  counts = [f"{runs} runs"] * (runs > 1) + [f"{seeds} seed" + "s" * (seeds > 1)]
  return f"{names['backbone']} on {names['data']}, {', '.join(counts)}"


def _checks(tables: Sequence[Table]) -> str:
  """Returns whether the checks say that the numbers can be trusted."""
  found = [
    (row[table.header.index("check")], verdict)
    for table in tables
    if "check" in table.header
    for row in table.rows
    for verdict in row
    if verdict in VERDICTS
  ]
  if not found:
    return ""
  odd = sorted({f"{name}: {v}" for name, v in found if v in ("warn", "fail")})
  said = "✓ No check of these numbers warns or fails."
  if odd:
    said = f"⚠ Checks of these numbers: {', '.join(odd)}."
  return f"<p>{html.escape(said)} The tables below say what each saw.</p>"


def _plain(value: Any) -> str:
  """Returns JSON that may stand in a script element."""
  return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
