"""From rows to figures."""

import dataclasses
import itertools
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from roli_jax.results import comparison, record
from roli_jax.results.grouping import (
  CLEAN,
  Attacked,
  Group,
  attacks,
  by_group,
  by_run,
  by_seed,
  by_step,
  collect,
  kinds,
  measured_curves,
  told_apart,
)
from roli_jax.results.pictures import empty, examples
from roli_jax.results.record import Row

if TYPE_CHECKING:
  from matplotlib.figure import Figure
else:  # matplotlib is an extra, and slow to import
  Figure = Any

# Of a group, by its method or else its init; the same in every figure.
_COLOURS = {
  "linear": "#777777",
  "ranli": "#d1495b",
  "roli": "#00798c",
  "std": "#edae49",
}
_ATTACK_COLOURS = ["#d1495b", "#edae49", "#66a182", "#8d5a97", "#2e4057"]


def write(
  rows: Sequence[Row],
  log: Sequence[Row],
  folder: pathlib.Path,
  evaluated: Sequence[Row] = (),
) -> list[pathlib.Path]:
  """Draws what the rows allow, each figure as a PNG.

  Args:
    rows: the rows of results.
    log: the rows of `training.jsonl`.
    folder: where figures go, and where `examples.npz` lies if there is one.
    evaluated: summaries of ensembles and searches.

  Returns:
    The files.
  """
  folder.mkdir(exist_ok=True)
  figures = {
    "accuracy": bars(rows),
    "curve": _curve(rows),
    "evaluations": _evaluations(evaluated),
    "examples": _examples(folder / "examples.npz"),
    "frontier": _frontier(record.where(rows, split="test")),
    "training": _training(rows, log),
  }
  return _save(figures, folder)


def write_sweep(
  rows: Sequence[Row], folder: pathlib.Path
) -> list[pathlib.Path]:
  """Draws a sweep's runs side by side, and ensembles' frontiers, as PNG.

  Args:
    rows: the rows of all runs.
    folder: where figures go.

  Returns:
    The files.
  """
  folder.mkdir(exist_ok=True)
  tests = record.where(rows, split="test")
  return _save({"runs": _runs(tests), "frontier": _frontier(tests)}, folder)


def broken(summaries: Sequence[Row], names: Sequence[str]) -> Figure:
  """Draws what became of images: a bar an evaluation, its parts the attacks.

  Args:
    summaries: what `evaluate.Result.summary` returns, one for each bar.
    names: the names of the bars.

  Returns:
    The figure.
  """
  figure = empty(9, 1.4 + 0.5 * len(summaries))
  axis = figure.subplots()
  known = {name: None for one in summaries for name in one["broken_by"]}
  order = ["", *(n for n in known if n not in ("", "clean")), "clean"]
  colours = dict(zip(order[1:-1], _ATTACK_COLOURS * 3, strict=False))
  colours |= {"": "#00798c", "clean": "#bbbbbb"}
  labels = {"": "robust", "clean": "misclassified before"}
  for y, one in enumerate(summaries):
    left = 0.0
    for name in order:
      share = 100 * one["broken_by"].get(name, 0) / one["n"]
      label = labels.get(name, f"broken by {name}") if y == 0 else None
      axis.barh(y, share, left=left, color=colours[name], label=label)
      left += share
    low, high = (100 * one["robust"][k] for k in ("low", "high"))
    axis.plot([low, high], [y, y], color="black", linewidth=1.5)
  axis.set_yticks(range(len(names)), list(names), fontsize=7)
  axis.set(
    xlabel="% of test images; line: 95% Wilson interval of robust",
    xlim=(0, 100),
  )
  axis.invert_yaxis()
  figure.legend(fontsize=7, ncols=4, loc="outside upper center")
  return figure


def by_radius(
  lines: Mapping[str, Mapping[float, float | int]],
  norm: str,
  eps: float | int,
) -> Figure:
  """Draws accuracy against the radius.

  Args:
    lines: by name, the accuracy at each radius, in [0, 1].
    norm: the norm of the radii, for the label of their axis.
    eps: the radius that is marked.

  Returns:
    The figure.
  """
  figure = empty(5.5, 4)
  axis = figure.subplots()
  for name, points in lines.items():
    style = "o-" if len(points) < 20 else "-"
    axis.plot(*_in_percent(points), style, label=name)
  axis.axvline(eps, color="black", linewidth=0.8, linestyle=":")
  axis.set(xlabel=f"eps ({norm})", ylabel="accuracy, %", ylim=(0, 100))
  axis.grid(alpha=0.3)
  axis.legend(fontsize=8)
  return figure


def _in_percent(
  points: Mapping[float, float | int],
) -> tuple[list[float], list[float]]:
  """Returns a curve's radii, sorted, and its accuracies there in percent."""
  radii = sorted(points)
  return radii, [100 * points[radius] for radius in radii]


def _save(
  figures: Mapping[str, Figure | None],
  folder: pathlib.Path,
) -> list[pathlib.Path]:
  written = []
  for name, figure in figures.items():
    if figure is not None:
      written.append(folder / f"{name}.png")
      figure.savefig(written[-1], dpi=120)
  return written


def _mean_and_deviation(
  rows: Iterable[Row], kind: Attacked
) -> tuple[float, float] | None:
  """Returns those of seeds, in percent; the deviation of one seed is 0."""
  values = [100 * value for value in by_seed(rows, kind).values()]
  if not values:
    return None
  deviation = statistics.stdev(values) if len(values) > 1 else 0.0
  return statistics.mean(values), deviation


def _runs(tests: Sequence[Row]) -> Figure | None:
  """Draws each run as a line, each kind of accuracy as a mark with whiskers."""
  runs = comparison.by_name(tests)
  if not runs:
    return None
  shown = kinds(tests)
  figure = empty(8, 1.6 + 0.45 * len(runs))
  axis = figure.subplots()
  for i, kind in enumerate(shown):
    label = kind.name
    for y, (_, own) in enumerate(runs.values()):
      if measured := _mean_and_deviation(own, kind):
        axis.errorbar(
          measured[0],
          y + 0.09 * (i - len(shown) / 2),
          xerr=measured[1],
          fmt="osD^vP*X"[i % 8],
          color=f"C{i}",
          markersize=5,
          capsize=2,
          label=label,
        )
        label = ""  # one entry in the legend for each kind
  axis.set_yticks(range(len(runs)), list(runs), fontsize=8)
  axis.invert_yaxis()
  axis.grid(axis="x", alpha=0.3)
  axis.set_xlabel("test accuracy, %; whiskers: standard deviation of seeds")
  figure.legend(fontsize=7, ncols=3, loc="outside upper center")
  return figure


def _frontier(tests: Sequence[Row]) -> Figure | None:
  """Draws clean against robust accuracy of ensembles, over all alphas."""
  main = attacks(tests)[:1]
  lines: dict[str, dict[float, tuple[float, float]]] = {}
  stars: dict[str, tuple[float, float]] = {}
  for run, of_run in by_run(tests).items():
    for group, own in by_group(of_run).items():
      family, _, alpha = group.stage.partition("-")
      if group.is_member or family == "vrf":
        clean, robust = (
          100 * statistics.mean(by_seed(own, kind).values())
          for kind in (CLEAN, *main)
        )
        name = f"{family}, {group.method} {group.weights} {run}"
        if alpha:
          lines.setdefault(name, {})[float(alpha)] = clean, robust
        else:
          stars[name] = clean, robust
  if not lines:
    return None
  figure = empty(6, 4.6)
  axis = figure.subplots()
  ends = {0.0: "probe", 1.0: "fine-tuned"}
  for name, points in lines.items():
    in_order = [points[alpha] for alpha in sorted(points)]
    axis.plot(*zip(*in_order, strict=True), "o-", markersize=4, label=name)
    for end, label in ends.items():
      axis.annotate(
        label,
        points[end],
        fontsize=8,
        xytext=(4, -10),
        textcoords="offset points",
      )
  for name, point in stars.items():
    axis.plot(*point, "*", markersize=12, label=name)
  axis.set(
    xlabel="clean accuracy, %", ylabel=f"accuracy under {main[0].name}, %"
  )
  axis.legend(fontsize=8)
  return figure


def _colour(group: Group) -> str:
  return _COLOURS["linear" if group.method == "linear" else group.init]


def bars(rows: Sequence[Row]) -> Figure | None:
  """Draws clean and robust accuracy of each group, with whiskers for seeds.

  A panel for each backbone and number of images, with what RoLI gains there.

  Args:
    rows: the rows of results.

  Returns:
    The figure, or None if nothing was tested.
  """
  tests = record.where(rows, split="test")
  if not tests:
    return None
  groups = {g: own for g, own in by_group(tests).items() if not g.is_member}
  attack = attacks(tests)[0]
  panels = collect(groups, lambda group: (group.weights, group.train_size))
  figure = empty(2 + 1.3 * len(groups), 4.4)
  widths = [len(shown) for shown in panels.values()]
  (axes,) = figure.subplots(
    1, len(widths), sharey=True, squeeze=False, width_ratios=widths
  )
  for axis, ((backbone, size), shown) in zip(axes, panels.items(), strict=True):
    for x, group in enumerate(shown):
      for kind, side, alpha in ((CLEAN, -0.2, 0.4), (attack, 0.2, 1.0)):
        if measured := _mean_and_deviation(groups[group], kind):
          mean, deviation = measured
          axis.bar(
            x + side,
            mean,
            width=0.38,
            yerr=deviation,
            capsize=3,
            color=_colour(group),
            alpha=alpha,
          )
          axis.text(x + side, 2, f"{mean:.1f}", ha="center", fontsize=8)
    names = ["\n".join(told_apart(group, shown)) for group in shown]
    axis.set_xticks(range(len(shown)), names, fontsize=8)
    axis.set_title(f"{backbone} backbone, {size} images")
    axis.set_xlabel(_gains({g: groups[g] for g in shown}, attack), fontsize=8)
    axis.set_ylim(0, 100)
  axes[0].set_ylabel("test accuracy, %")
  figure.suptitle(
    f"pale: clean; full: {attack.name}; whiskers: standard deviation of seeds",
    fontsize=9,
  )
  return figure


def _gains(groups: Mapping[Group, Sequence[Row]], attack: Attacked) -> str:
  """Says what RoLI gains on a random head under the attack, and how surely."""
  pairs = [
    (
      (f"{ours.name} − {theirs.name}", attack.name),
      by_seed(groups[ours], attack),
      by_seed(groups[theirs], attack),
    )
    for ours, theirs in itertools.product(groups, repeat=2)
    if ours.init == "roli"
    and dataclasses.replace(ours, init="ranli", lr=theirs.lr) == theirs
  ]
  return "\n".join(
    f"{each.name}\n{each.mean:+.1f}, 95% Student interval"
    f" [{each.low:+.1f}, {each.high:+.1f}]"
    for each in comparison.intervals(comparison.paired("", ("", ""), pairs))
  )


def _curve(rows: Sequence[Row]) -> Figure | None:
  """Draws accuracy against eps, of the seed for which it was measured."""
  tests = record.where(rows, split="test")
  curves = measured_curves(tests)
  if not curves:
    return None
  main = attacks(tests)[0]
  norms = sorted({curve.norm for curve in curves})
  figure = empty(5.5 * len(norms), 4)
  (axes,) = figure.subplots(1, len(norms), sharey=True, squeeze=False)
  for axis, norm in zip(axes, norms, strict=True):
    for curve, points in curves.items():
      if curve.norm == norm:
        style = "o-" if curve.recipe == main.recipe else "s--"
        color = _colour(curve.group)
        axis.plot(*_in_percent(points), style, color=color, label=curve.name)
    if norm == main.norm and main.eps is not None:
      axis.axvline(main.eps, color="black", linewidth=0.8, linestyle=":")
      axis.annotate("training radius", (main.eps, 2), fontsize=8)
    axis.set(xlabel=f"eps ({norm})", ylim=(0, 100))
    axis.legend(fontsize=7)
  axes[0].set_ylabel("test accuracy, %")
  return figure


def _evaluations(
  summaries: Sequence[Row],
) -> Figure | None:
  """Draws what became of each evaluation's images, under cells' names."""
  if not summaries:
    return None
  titles = []
  for summary in summaries:
    row = summary["row"]
    attack = f"{Attacked.of(row).recipe}, {row['norm']} {summary['eps']:g}"
    titles.append(f"{row['cell']}\n{attack}, n {summary['n']}")
  return broken(summaries, titles)


def _training(rows: Sequence[Row], log: Sequence[Row]) -> Figure | None:
  """Draws training loss and validation accuracy by step, means over seeds."""
  held_out = record.where(log, split="val", metric="accuracy")
  shown = {
    "training loss": record.where(log, split="train", metric="loss"),
    "adversarial validation accuracy": [
      row for row in held_out if row["attack"] != "none"
    ],
  }
  figure = empty(9, 3.8)
  axes = figure.subplots(1, 2)
  for axis, (name, logged) in zip(axes, shown.items(), strict=True):
    curves = by_step(rows, logged)
    for group, points in curves.items():
      axis.plot(
        list(points),
        list(points.values()),
        "-" if group.weights == "robust" else "--",
        color=_colour(group),
        label=", ".join([*told_apart(group, curves), group.weights]),
      )
    axis.set(xlabel="step", ylabel=name)
  if not axes[0].lines:
    return None
  axes[0].set_yscale("log")
  axes[1].legend(fontsize=6)
  return figure


def _examples(file: pathlib.Path) -> Figure | None:
  """Draws the adversarial examples that were kept of the last stage."""
  if not file.exists():
    return None
  kept = np.load(file)
  names = ("images", "adv", "labels", "clean_said", "adv_said")
  return examples(
    *(kept[name] for name in names),
    eps=float(kept["eps"]),
    title=f"{kept['cell']}: what the model says",
  )
