"""Figures whose values are seen under the pointer, by plotly."""

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from roli_jax.files import extras
from roli_jax.results import record
from roli_jax.results.grouping import (
  attacks,
  by_run,
  by_step,
  measured_curves,
  told_apart,
)
from roli_jax.results.page.answers import named
from roli_jax.results.record import Row

if TYPE_CHECKING:
  from plotly.graph_objects import Figure
else:  # plotly is an extra
  Figure = Any

# Seen on white and on black. Lines differ in their dashes and marks as well.
_COLOURS = ("#159f8f", "#e0691f", "#9a6fe0", "#d6487e", "#3f8fd9", "#8a8a8a")
_DASHES = ("solid", "dash", "dot", "dashdot")
_MARKS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross")

_LOSS = "Training loss"

# The name of a line, and its values by x.
Lines = Mapping[str, Mapping[int, float] | Mapping[float, float]]


def by_radius(rows: Sequence[Row]) -> dict[str, Figure]:
  """Draws accuracy against eps; returns a figure for each norm, by title."""
  tests = named(record.where(rows, split="test"))
  found: dict[str, dict[str, dict[float, float]]] = {}
  for run, of_run in by_run(tests).items():
    for curve, points in measured_curves(of_run).items():
      name = f"{run}: {curve.name}".removeprefix(": ")
      in_order = {eps: points[eps] for eps in sorted(points)}
      found.setdefault(curve.norm, {})[name] = in_order
  drawn = {}
  for norm, lines in found.items():
    figure = _draw(lines, f"eps ({norm})")
    main = attacks(tests)[0]
    if main.norm == norm and main.eps is not None:
      figure.add_vline(main.eps, line={"width": 1, "dash": "dot"})
      figure.add_annotation(
        x=main.eps, y=1, text="radius of the first table", xanchor="left",
        showarrow=False,
      )  # fmt: skip
    drawn[f"Test accuracy, {norm}"] = figure
  return drawn


def training(
  runs: Mapping[str, Sequence[Row]], logs: Mapping[str, Sequence[Row]]
) -> dict[str, Figure]:
  """Draws loss and accuracies by step, means over the seeds of a run.

  Args:
    runs: the rows of results, by run.
    logs: the rows of `training.jsonl`, by run.

  Returns:
    The figures, by title.
  """
  shown: dict[str, dict[str, Mapping[int, float]]] = {}
  for run, rows in runs.items():
    for what, logged in _logged(logs[run]).items():
      curves = by_step(rows, logged)
      for group, points in curves.items():
        name = ", ".join([*told_apart(group, curves), group.weights])
        lines = shown.setdefault(what, {})
        lines[f"{run}: {name}".removeprefix(": ")] = points
  return {
    what: _draw(lines, "step", is_rate=what != _LOSS)
    for what, lines in shown.items()
  }


def _logged(log: Sequence[Row]) -> dict[str, list[Row]]:
  """Returns the rows of a log that are drawn, by what they are."""
  held_out = record.where(log, split="val", metric="accuracy")
  return {
    _LOSS: record.where(log, split="train", metric="loss"),
    "Validation accuracy under attack": [
      row for row in held_out if row["attack"] != "none"
    ],
    "Validation accuracy, clean": record.where(held_out, attack="none"),
  }


def _draw(lines: Lines, x: str, *, is_rate: bool = True) -> Figure:
  """Draws lines whose values are shown at the pointer.

  Args:
    lines: by name, y by x.
    x: the title of the x axis.
    is_rate: whether values are rates, shown in percent from 0 to 100.
  """
  extras.need("plotly")
  from plotly import graph_objects

  figure = graph_objects.Figure()
  value = "%{y:.1%}" if is_rate else "%{y:.3g}"
  for i, (name, points) in enumerate(lines.items()):
    figure.add_scatter(
      x=list(points),
      y=list(points.values()),
      name=name,
      mode="lines+markers",
      line={
        "color": _COLOURS[i % len(_COLOURS)],
        "dash": _DASHES[i % len(_DASHES)],
      },
      marker={"symbol": _MARKS[i % len(_MARKS)], "size": 8},
      hovertemplate=f"{value}<extra>%{{fullData.name}}</extra>",
    )
  clear = "rgba(0,0,0,0)"
  figure.update_layout(
    template="none",  # its ink is the page's
    height=320 + 18 * len(lines),
    margin={"l": 48, "r": 12, "t": 12, "b": 48},
    paper_bgcolor=clear,
    plot_bgcolor=clear,
    font={"size": 13, "family": "system-ui, sans-serif"},
    showlegend=True,
    legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    hovermode="x unified",
    hoverlabel={"namelength": -1},
  )
  figure.update_xaxes(title=x)
  if is_rate:
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%")
  else:
    figure.update_yaxes(type="log")
  return figure


def as_html(figures: Mapping[str, Figure]) -> str:
  """Returns figures, by their titles, for a page that has plotly's script."""
  from plotly import io

  if not figures:
    return "<p>This was not measured.</p>"
  config = {"responsive": True, "displayModeBar": False}
  drawn = []
  for title, figure in figures.items():
    plot = io.to_html(figure, config, include_plotlyjs=False, full_html=False)
    drawn.append(f"<div><h3>{html.escape(title)}</h3>{plot}</div>")
  return "\n".join(drawn)
