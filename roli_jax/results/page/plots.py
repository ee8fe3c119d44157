"""Figures whose values are seen under the pointer, by plotly."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from roli_jax.files import extras
from roli_jax.results import comparison, record
from roli_jax.results.grouping import (
  attacks,
  by_run,
  by_step,
  measured_curves,
  told_apart,
)
from roli_jax.results.page.answers import named
from roli_jax.results.record import Row
from roli_jax.results.tables import Table

if TYPE_CHECKING:
  from plotly.graph_objects import Figure
else:  # plotly is an extra
  Figure = Any

# Seen on white and on black. Lines differ in their dashes and marks as well.
_COLOURS = ("#159f8f", "#e0691f", "#9a6fe0", "#d6487e", "#3f8fd9", "#8a8a8a")
_DASHES = ("solid", "dash", "dot", "dashdot")
_MARKS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross")

# The name of a line, and its values by x.
Lines = Mapping[str, Mapping[int, float] | Mapping[float, float]]


def by_radius(rows: Sequence[Row]) -> list[Figure]:
  """Draws accuracy against eps, a figure for each norm."""
  tests = named(record.where(rows, split="test"))
  found: dict[str, dict[str, dict[float, float]]] = {}
  for run, of_run in by_run(tests).items():
    for curve, points in measured_curves(of_run).items():
      name = f"{run}: {curve.name}".removeprefix(": ")
      in_order = {eps: 100 * points[eps] for eps in sorted(points)}
      found.setdefault(curve.norm, {})[name] = in_order
  drawn = []
  for norm, lines in found.items():
    figure = _lines(lines, f"eps ({norm})", "test accuracy, %", "%{y:.1f} %")
    figure.update_yaxes(range=[0, 101])
    main = attacks(tests)[0]
    if main.norm == norm and main.eps is not None:
      figure.add_vline(main.eps, line={"width": 1, "dash": "dot"})
      figure.add_annotation(
        x=main.eps, y=100, text="the attack of the table", xanchor="left",
        showarrow=False,
      )  # fmt: skip
    drawn.append(figure)
  return drawn


def training(
  runs: Mapping[str, Sequence[Row]], logs: Mapping[str, Sequence[Row]]
) -> list[Figure]:
  """Draws loss and accuracies by step, means over the seeds of a run.

  Args:
    runs: the rows of results, by run.
    logs: the rows of `training.jsonl`, by run.
  """
  shown: dict[str, dict[str, Mapping[int, float]]] = {}
  for run, rows in runs.items():
    for what, logged in _logged(logs[run]).items():
      curves = by_step(rows, logged)
      for group, points in curves.items():
        name = ", ".join([*told_apart(group, curves), group.weights])
        lines = shown.setdefault(what, {})
        lines[f"{run}: {name}".removeprefix(": ")] = points
  drawn = []
  for what, lines in shown.items():
    is_loss = what.endswith("loss")
    figure = _lines(lines, "step", what, "%{y:.3g}" if is_loss else "%{y:.1%}")
    if is_loss:
      figure.update_yaxes(type="log")
    else:
      figure.update_yaxes(range=[0, 1.01], tickformat=".0%")
    drawn.append(figure)
  return drawn


def _logged(log: Sequence[Row]) -> dict[str, list[Row]]:
  """Returns the rows of a log that are drawn, by what they are."""
  held_out = record.where(log, split="val", metric="accuracy")
  return {
    "training loss": record.where(log, split="train", metric="loss"),
    "validation accuracy under attack": [
      row for row in held_out if row["attack"] != "none"
    ],
    "validation accuracy, clean": record.where(held_out, attack="none"),
  }


def differences(tables: Iterable[Table]) -> list[Figure]:
  """Draws the intervals of paired differences, of tables that have any."""
  drawn = []
  for table in tables:
    if found := comparison.intervals(table):
      drawn.append(_intervals(found))
  return drawn


def _intervals(found: Sequence[comparison.Interval]) -> Figure:
  """Draws a line for each difference, its name above it."""
  figure = _figure(90 + 44 * len(found))
  for y, one in enumerate(found):
    is_separated = one.verdict.startswith(("higher", "lower"))
    figure.add_scatter(
      x=[one.mean],
      y=[y],
      error_x={
        "type": "data",
        "array": [one.high - one.mean],
        "arrayminus": [one.mean - one.low],
        "thickness": 2,
        "width": 5,
      },
      marker={
        "color": _COLOURS[0] if is_separated else _COLOURS[-1],
        "symbol": "circle" if is_separated else "circle-open",
        "size": 10,
      },
      hovertemplate=f"{one.mean:+.1f} [{one.low:+.1f}, {one.high:+.1f}]"
      f"<br>{one.verdict}<extra></extra>",
      showlegend=False,
    )
    figure.add_annotation(
      x=0, y=y - 0.36, xref="paper", text=f"{one.name}: {one.verdict}",
      xanchor="left", align="left", showarrow=False,
    )  # fmt: skip
  figure.add_vline(0, line={"width": 1})
  figure.update_yaxes(
    visible=False, range=[len(found) - 0.5, -0.7], fixedrange=True
  )
  figure.update_xaxes(title="points of accuracy")
  return figure


def _lines(lines: Lines, x: str, y: str, value: str) -> Figure:
  """Draws lines whose values are shown at the pointer.

  Args:
    lines: by name, y by x.
    x: the title of the x axis.
    y: the title of the y axis.
    value: how plotly writes a value.
  """
  figure = _figure(330 + 22 * len(lines))
  styles = zip(
    itertools.cycle(_COLOURS),
    itertools.cycle(_DASHES),
    itertools.cycle(_MARKS),
    strict=False,
  )
  for (name, points), (colour, dash, mark) in zip(
    lines.items(), styles, strict=False
  ):
    figure.add_scatter(
      x=list(points),
      y=list(points.values()),
      name=name,
      mode="lines+markers",
      line={"color": colour, "dash": dash},
      marker={"symbol": mark, "size": 8},
      hovertemplate=f"{value}<extra>%{{fullData.name}}</extra>",
    )
  figure.update_layout(hovermode="x unified")
  figure.update_xaxes(title=x)
  figure.update_yaxes(title=y)
  return figure


def _figure(height: int) -> Figure:
  """Returns an empty figure, so many pixels high; its ink is the page's."""
  extras.need("plotly")
  from plotly import graph_objects

  clear = "rgba(0,0,0,0)"
  figure = graph_objects.Figure()
  figure.update_layout(
    template="none",
    height=height,
    margin={"l": 56, "r": 12, "t": 12, "b": 48},
    paper_bgcolor=clear,
    plot_bgcolor=clear,
    font={"size": 13, "family": "system-ui, sans-serif"},
    legend={"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0},
    legend_bgcolor=clear,
    hoverlabel={"namelength": -1},
  )
  return figure


def as_html(figures: Iterable[Figure]) -> str:
  """Returns the figures for a page that has plotly's script; "" of none."""
  from plotly import io

  config = {"responsive": True, "displayModeBar": False}
  drawn = [
    io.to_html(figure, config, include_plotlyjs=False, full_html=False)
    for figure in figures
  ]
  return "\n".join(drawn)
