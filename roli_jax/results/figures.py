"""From rows to figures."""

import collections
import dataclasses
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from roli_jax.files import extras
from roli_jax.results import comparison, record
from roli_jax.results.grouping import (
  CLEAN,
  Attacked,
  Group,
  attacks,
  by_group,
  by_seed,
  curved,
  is_member,
)

Row = dict[str, Any]

# Of a group: linear, RanLI, RoLI, std; the same colour in every figure.
_COLOURS = {
  "linear": "#777777",
  "ranli": "#d1495b",
  "roli": "#00798c",
  "std": "#edae49",
}


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
  """
  folder.mkdir(exist_ok=True)
  examples = folder / "examples.npz"
  figures = {
    "accuracy": lambda: _bars(rows),
    "curve": lambda: _curve(rows),
    "evaluations": lambda: _evaluations(evaluated),
    "examples": lambda: _examples(examples) if examples.exists() else None,
    "frontier": lambda: _frontier(record.where(rows, split="test")),
    "training": lambda: _training(rows, log),
  }
  return _save({name: draw() for name, draw in figures.items()}, folder)


def write_sweep(
  rows: Sequence[Row], folder: pathlib.Path
) -> list[pathlib.Path]:
  """Draws a sweep's runs side by side, and ensembles' frontiers, as PNG.

  Args:
    rows: the rows of all runs.
    folder: where figures go.
  """
  folder.mkdir(exist_ok=True)
  tests = record.where(rows, split="test")
  return _save({"runs": _runs(tests), "frontier": _frontier(tests)}, folder)


def examples(
  images: np.ndarray,
  adv: np.ndarray,
  labels: np.ndarray,
  clean_said: np.ndarray,
  adv_said: np.ndarray,
  *,
  eps: float | int,
  title: str = "",
) -> Any:
  """Clean images, what was added to them, and what came out.

  Args:
    images: [n, h, w, c] in [0, 1], n at least 1.
    adv: the adversarial images, of the same shape.
    labels: [n], classes or their names.
    clean_said: [n], what the model says of the clean images.
    adv_said: [n], and of the adversarial ones.
    eps: a change that is drawn black or white; grey is none.
    title: above it all.

  Returns:
    A figure of matplotlib's.
  """
  figure = _figure(1.1 * len(images) + 1, 4.2)
  axes = figure.subplots(3, len(images), squeeze=False)
  added = (adv - images) / (2 * eps) + 0.5
  kinds = {"clean": images, f"change (±{eps:.2g})": added, "adversarial": adv}
  for line, (name, shown) in zip(axes, kinds.items(), strict=True):
    for axis, image in zip(line, shown, strict=True):
      axis.imshow(np.clip(image, 0, 1).squeeze(), cmap="gray", vmin=0, vmax=1)
      axis.set(xticks=[], yticks=[])
    line[0].set_ylabel(name)
  for line, said in ((axes[0], clean_said), (axes[2], adv_said)):
    for axis, label, guess in zip(line, labels, said, strict=True):
      right = label == guess
      between = " " if len(f"{guess}{label}") < 8 else "\n"
      axis.set_title(
        f"{guess}" if right else f"{guess}{between}(is {label})",
        color="black" if right else "#d1495b",
        fontsize=9,
      )
  figure.suptitle(title, fontsize=9)
  return figure


def broken(summaries: Sequence[Row], names: Sequence[str]) -> Any:
  """What became of each evaluation's images: a bar, its parts the attacks.

  Args:
    summaries: what `evaluate.Result.summary` returns, one for each bar.
    names: the names of the bars.

  Returns:
    A figure of matplotlib's.
  """
  figure = _figure(9, 1.4 + 0.5 * len(summaries))
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
) -> Any:
  """Accuracy against the radius.

  Args:
    lines: by name, the accuracy at each radius, in [0, 1].
    norm: the norm of the radii.
    eps: the one that is marked.

  Returns:
    A figure of matplotlib's.
  """
  figure = _figure(5.5, 4)
  axis = figure.subplots()
  for name, points in lines.items():
    radii = sorted(points)
    axis.plot(
      radii,
      [100 * points[radius] for radius in radii],
      "o-" if len(radii) < 20 else "-",
      label=name,
    )
  axis.axvline(eps, color="black", linewidth=0.8, linestyle=":")
  axis.set(xlabel=f"eps ({norm})", ylabel="accuracy, %", ylim=(0, 100))
  axis.grid(alpha=0.3)
  axis.legend(fontsize=8)
  return figure


def _save(figures, folder):
  written = []
  for name, figure in figures.items():
    if figure is not None:
      written.append(folder / f"{name}.png")
      figure.savefig(written[-1], dpi=120)
  return written


def _runs(tests):
  """Each run a line, each kind of accuracy a mark with its seeds' spread."""
  lines = comparison.lines_of(tests)
  if not lines:
    return None
  kinds = comparison.kinds(tests)
  figure = _figure(8, 1.6 + 0.45 * len(lines))
  axis = figure.subplots()
  for i, (name, kind) in enumerate(kinds.items()):
    label = name
    for y, (_, own) in enumerate(lines.values()):
      values = [100 * x for x in comparison.values(own, kind).values()]
      if values:
        axis.errorbar(
          statistics.mean(values),
          y + 0.09 * (i - len(kinds) / 2),
          xerr=statistics.stdev(values) if len(values) > 1 else 0,
          fmt="osD^vP*X"[i % 8],
          color=f"C{i}",
          markersize=5,
          capsize=2,
          label=label,
        )
        label = ""
  axis.set_yticks(range(len(lines)), list(lines), fontsize=8)
  axis.invert_yaxis()
  axis.grid(axis="x", alpha=0.3)
  axis.set_xlabel("test accuracy, %; whiskers: standard deviation of seeds")
  figure.legend(fontsize=7, ncols=3, loc="outside upper center")
  return figure


def _frontier(tests):
  """Clean against robust accuracy of ensembles, over all alphas."""
  main = attacks(tests)[:1]
  lines: dict[str, dict[float, tuple[float, float]]] = {}
  stars: dict[str, tuple[float, float]] = {}
  for run, of_run in comparison.runs(tests).items():
    for group, own in by_group(of_run).items():
      family, _, alpha = group.stage.partition("-")
      if is_member(group) or family == "vrf":
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
  figure = _figure(6, 4.6)
  axis = figure.subplots()
  for name, points in lines.items():
    at = [points[alpha] for alpha in sorted(points)]
    axis.plot(*zip(*at, strict=True), "o-", markersize=4, label=name)
    for alpha, said in ((0, "probe"), (1, "fine-tuned")):
      axis.annotate(said, points[alpha], fontsize=8, xytext=(4, -10),
                    textcoords="offset points")  # fmt: skip
  for name, point in stars.items():
    axis.plot(*point, "*", markersize=12, label=name)
  axis.set(
    xlabel="clean accuracy, %", ylabel=f"accuracy under {main[0].name}, %"
  )
  axis.legend(fontsize=8)
  return figure


def _figure(width, height):
  extras.need("matplotlib")
  from matplotlib import figure

  return figure.Figure(figsize=(width, height), layout="constrained")


def _colour(group):
  return _COLOURS["linear" if group.method == "linear" else group.init]


def _label(group, groups):
  """What tells this group from the others."""
  parts = [group.name]
  for field, word in (("train_size", "{} images"), ("steps", "{} steps")):
    values = {getattr(g, field) for g in groups if g.stage == group.stage}
    if len(values) > 1:
      parts.append(word.format(getattr(group, field)))
  return "\n".join(parts)


def _bars(rows):
  """Clean and robust accuracy of each group: mean and spread over seeds."""
  tests = record.where(rows, split="test")
  if not tests:
    return None
  groups = {g: of for g, of in by_group(tests).items() if not is_member(g)}
  attack = attacks(tests)[0]
  backbones = collections.Counter(group.weights for group in groups)
  figure = _figure(2 + 1.3 * len(groups), 4.4)
  axes = figure.subplots(
    1,
    len(backbones),
    sharey=True,
    squeeze=False,
    width_ratios=list(backbones.values()),
  )[0]
  for axis, backbone in zip(axes, backbones, strict=True):
    own = [group for group in groups if group.weights == backbone]
    for x, group in enumerate(own):
      for kind, side, alpha in ((CLEAN, -0.2, 0.4), (attack, 0.2, 1.0)):
        own_values = by_seed(groups[group], kind).values()
        values = [100 * value for value in own_values]
        if not values:
          continue
        mean = statistics.mean(values)
        axis.bar(
          x + side,
          mean,
          width=0.38,
          yerr=statistics.stdev(values) if len(values) > 1 else 0,
          capsize=3,
          color=_colour(group),
          alpha=alpha,
        )
        axis.text(x + side, 2, f"{mean:.1f}", ha="center", fontsize=8)
    labels = [_label(group, groups) for group in own]
    axis.set_xticks(range(len(own)), labels, fontsize=8)
    axis.set_title(f"{backbone} backbone")
    axis.set_ylim(0, 100)
  axes[0].set_ylabel("test accuracy, %")
  figure.suptitle(
    f"pale: clean; full: {attack.name}; whiskers: standard deviation of seeds",
    fontsize=9,
  )
  return figure


def _curve(rows):
  """Accuracy against eps, of the seed for which it was measured."""
  tests = record.where(rows, split="test")
  curves = curved(tests)
  if not curves:
    return None
  main = attacks(tests)[0]
  norms = sorted({curve.norm for curve in curves})
  figure = _figure(5.5 * len(norms), 4)
  axes = figure.subplots(1, len(norms), sharey=True, squeeze=False)[0]
  for axis, norm in zip(axes, norms, strict=True):
    for curve, points in curves.items():
      if curve.norm == norm:
        axis.plot(
          sorted(points),
          [100 * points[eps] for eps in sorted(points)],
          "o-" if curve.recipe == main.recipe else "s--",
          color=_colour(curve.group),
          label=curve.name,
        )
    if norm == main.norm:
      axis.axvline(main.eps, color="black", linewidth=0.8, linestyle=":")
      axis.annotate("training radius", (main.eps, 2), fontsize=8)
    axis.set(xlabel=f"eps ({norm})", ylim=(0, 100))
    axis.legend(fontsize=7)
  axes[0].set_ylabel("test accuracy, %")
  return figure


def _evaluations(evaluated):
  """What became of each evaluation's images, under the names of cells."""
  if not evaluated:
    return None
  return broken(evaluated, [_title(one) for one in evaluated])


def _title(one):
  row = one["row"]
  recipe = Attacked.of(row).recipe
  return f"{row['cell']}\n{recipe}, {row['norm']} {one['eps']:g}, n {one['n']}"


_ATTACK_COLOURS = ["#d1495b", "#edae49", "#66a182", "#8d5a97", "#2e4057"]


def _training(rows, log):
  """Training loss and validation accuracy by step, means over seeds."""
  groups = {row["cell"]: Group.of(row) for row in rows}
  figure = _figure(9, 3.8)
  axes = figure.subplots(1, 2)
  for axis, split, metric in (
    (axes[0], "train", "loss"),
    (axes[1], "val", "accuracy"),
  ):
    curves = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in record.where(log, split=split, metric=metric):
      group = groups.get(row["cell"])
      if group and (split == "train" or row["attack"] != "none"):
        group = dataclasses.replace(
          group, stage=row["stage"], steps=row["steps"], lr=row["lr"]
        )
        curves[group][row["step"]].append(row["value"])
    for group, points in curves.items():
      axis.plot(
        list(points),
        [statistics.mean(values) for values in points.values()],
        "-" if group.weights == "robust" else "--",
        color=_colour(group),
        label=f"{_label(group, curves)}, {group.weights}".replace("\n", ", "),
      )
    axis.set(xlabel="step", ylabel=f"{_SPLITS[split]} {metric}")
  if not axes[0].lines:
    return None
  axes[0].set_yscale("log")
  axes[1].legend(fontsize=6)
  return figure


_SPLITS = {"train": "training", "val": "adversarial validation"}


def _examples(file):
  """What was kept of the last stage, as a picture."""
  shown = np.load(file)
  return examples(
    shown["images"], shown["adv"], shown["labels"],
    shown["clean_said"], shown["adv_said"],
    eps=float(shown["eps"]), title=f"{shown['cell']}: what the model says",
  )  # fmt: skip
