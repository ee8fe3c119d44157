"""Many runs side by side, paired by seed, and what one run compares beside."""

import math
import re
from collections.abc import Iterable, Sequence
from statistics import mean

from roli_jax import statistics
from roli_jax.results import record
from roli_jax.results.grouping import (
  CLEAN,
  Attacked,
  Group,
  Row,
  attacks,
  by_group,
  by_seed,
  corrupted,
  curved,
  is_curve,
  is_member,
)
from roli_jax.results.tables import Table, percent, spread

Values = dict[int, float]  # by seed

_LEVEL = 0.05  # of error, at which two are called separated


def tables(rows: Sequence[Row]) -> list[Table]:
  """What a sweep found: its runs' accuracies, and how they differ."""
  made = [accuracies(rows), differences(rows), frontier(rows), expected(rows),
          corruptions(rows), validation(rows)]  # fmt: skip
  return [table for table in made if table.rows]


def runs(rows: Iterable[Row]) -> dict[str, list[Row]]:
  """Rows by the name of their run, without its seed."""
  found: dict[str, list[Row]] = {}
  for row in rows:
    name = re.sub(r"-?\bseed=\d+", "", row["run"])
    found.setdefault(name, []).append(row)
  return found


def lines_of(rows: Sequence[Row]) -> dict[str, tuple[Group, list[Row]]]:
  """What is compared, by name: runs that differ in their seed are one.

  A probe that several share stands once.
  """
  found: dict[str, tuple[Group, list[Row]]] = {}
  seen = set()
  for run, of_run in runs(rows).items():
    groups = {
      group: own
      for group, own in by_group(of_run).items()
      if not is_member(group)
    }
    adapted = [group for group in groups if group.stage != "probe"]
    for group, own in groups.items():
      if group.stage != "probe":
        alone = run and len(adapted) == 1
        name = run if alone else f"{run}: {group.name}".removeprefix(": ")
      elif group in seen:
        continue
      else:
        name = group.name
      seen.add(group)
      for field in ("weights", "train_size", "steps", "lr"):
        if name in found:
          name = f"{name}, {field} {getattr(group, field)}"
      found[name] = group, own
  return found


def kinds(tests: Sequence[Row]) -> dict[str, Attacked | None]:
  """What accuracy is told of; None stands for corruptions."""
  shown = [attack for attack in attacks(tests) if not is_curve(attack, tests)]
  found: dict[str, Attacked | None] = {
    attack.name: attack for attack in (CLEAN, *shown)
  }
  if any(Attacked.of(row).is_corruption for row in tests):
    found["corruptions"] = None
  return found


def values(own: Sequence[Row], kind: Attacked | None) -> Values:
  """Each seed's accuracy of a kind."""
  return corrupted(own) if kind is None else by_seed(own, kind)


def accuracies(rows: Sequence[Row]) -> Table:
  """Each run's test accuracies: mean and spread over seeds."""
  tests = record.where(rows, split="test")
  known = kinds(tests) if tests else {}
  lines = [
    (
      name,
      f"{group.lr:g}",
      str(len({row["seed"] for row in own})),
      *(spread(values(own, kind).values()) for kind in known.values()),
    )
    for name, (group, own) in lines_of(tests).items()
  ]
  counts = {
    name: sorted({r["n"] for r in tests if Attacked.of(r) == kind})
    for name, kind in known.items()
  }
  most = max((n for of in counts.values() for n in of), default=0)
  header = [
    name + (f", {of[0]} images" if of and of != [most] else "")
    for name, of in counts.items()
  ]
  return Table(
    "Test accuracy: percent, mean ± SD of seeds",
    ("run", "lr", "seeds", *header),
    lines,
    "Attacks that not all runs or seeds have seen say so by their gaps.",
  )


def differences(rows: Sequence[Row]) -> Table:
  """Each run minus the first, paired by seed, in each kind of accuracy."""
  tests = record.where(rows, split="test")
  if not tests:
    return Table("", (), ())
  every = lines_of(tests)
  adapted = [name for name, (of, _) in every.items() if of.stage != "probe"]
  names = adapted or list(every)
  first, *others = names
  base = every[first][1]
  pairs = [
    ((name, said), values(every[name][1], kind), values(base, kind))
    for name in others
    for said, kind in kinds(tests).items()
  ]
  return paired(f"Differences from {first}", ("run", "accuracy"), pairs)


def paired(
  title: str,
  names: tuple[str, ...],
  pairs: Iterable[tuple[tuple[str, ...], Values, Values]],
  note: str = "",
) -> Table:
  """The difference of each pair: every table of differences is made here.

  Only seeds that both sides have count. A pair has no line where one of its
  sides was not measured at all.

  Args:
    title: the title of the table.
    names: the names of the columns that say what is compared.
    pairs: for each line the cells of those columns, then the accuracies by
      seed, in [0, 1], of what is compared and of what is subtracted.
    note: what else the reader has to know.
  """
  measured = [pair for pair in pairs if pair[1] and pair[2]]
  each = [_points(ours, theirs) for _, ours, theirs in measured]
  corrected = statistics.holm([statistics.t_test(points) for points in each])
  lines = [
    (*pair[0], *_judged(points, p_holm))
    for pair, points, p_holm in zip(measured, each, corrected, strict=True)
  ]
  header = (*names, "mean", "95% Student interval", "each seed", "p_holm",
            "verdict")  # fmt: skip
  count = sum(not math.isnan(p_holm) for p_holm in corrected)
  said = (
    "In points, paired by the seeds that both have. The interval is Student's"
    " with seeds - 1 degrees of freedom, of each line alone; p_holm is the p"
    f" value after Holm's correction for the {count} comparisons of this table."
    f" A verdict says what it rests on: p_holm below {_LEVEL:g}, or the"
    " interval only, which chance gives one line in twenty."
  )
  return Table(title, header, lines, f"{said} {note}".strip())


def _points(ours: Values, theirs: Values) -> list[float]:
  """Differences in points, of the seeds that both have.

  Rounded, so that accuracies that differ alike have equal differences: what
  floating point leaves between them would pass for a spread.
  """
  seeds = sorted(ours.keys() & theirs.keys())
  return [round(100 * (ours[seed] - theirs[seed]), 9) for seed in seeds]


def _judged(points: list[float], p_holm: float) -> tuple[str, ...]:
  """Mean, interval, each seed, corrected p value and verdict, as text."""
  if not points:
    return "", "", "", "", "no seed in common"
  mean, low, high = statistics.t_interval(points)
  return (
    f"{mean:+.1f}",
    f"[{low:+.1f}, {high:+.1f}]" if math.isfinite(high - low) else "",
    " ".join(f"{value:+.1f}" for value in points),
    "" if math.isnan(p_holm) else f"{p_holm:.3g}",
    _verdict(points, low, high, p_holm),
  )


def _verdict(
  points: list[float], low: float, high: float, p_holm: float
) -> str:
  """Whether the two are separated, and by which: p_holm or the interval."""
  if len(points) < 2:
    return "one seed"
  if math.isnan(p_holm):
    return "not finite"
  side = "higher" if low + high > 0 else "lower"
  if p_holm < _LEVEL:
    return f"{side} (p_holm)"
  if low <= 0 <= high:
    return "not separated"
  if len(set(points)) == 1:
    return "no spread, not tested"
  return f"{side} (interval only)"


def frontier(rows: Sequence[Row]) -> Table:
  """Ensembles of a stage and what it started from, at every alpha."""
  tests = record.where(rows, split="test")
  both = (CLEAN, *attacks(tests)[:1])
  lines = [
    (
      f"{run}: {group.method}, {group.weights}",
      *group.stage.split("-"),
      *(spread(by_seed(own, kind).values()) for kind in both),
    )
    for run, of_run in runs(tests).items()
    for group, own in by_group(of_run).items()
    if is_member(group)
  ]
  return Table(
    "Ensembles by alpha: percent, mean ± SD of seeds",
    ("of", "ensemble", "alpha", *(kind.name for kind in both)),
    lines,
    "alpha 0: what the stage started from; 1: what it ended at.",
  )


def expected(rows: Sequence[Row]) -> Table:
  """Expected robustness, where accuracy was measured at several radii."""
  tests = record.where(rows, split="test")
  lines = []
  for run, of_run in runs(tests).items():
    for curve, points in curved(of_run).items():
      radii = sorted(points)
      if not radii[0] and not is_member(curve.group):
        value = statistics.expected_robustness(
          radii, [points[e] for e in radii]
        )
        about = (run, curve.group.name, str(curve.seed), curve.recipe)
        lines.append((*about, f"{radii[-1]:g} {curve.norm}", percent(value)))
  return Table(
    "Expected robustness: percent",
    ("run", "method", "seed", "attack", "up to", "mean accuracy"),
    lines,
    "The mean accuracy over the radii from 0, by trapezia.",
  )


def corruptions(rows: Sequence[Row]) -> Table:
  """Accuracy under each corruption, the mean over severities and seeds."""
  tests = record.where(rows, split="test")
  corrupt = [row for row in tests if Attacked.of(row).is_corruption]
  names = sorted({row["attack"] for row in corrupt})
  lines = []
  for run, (_, own) in lines_of(corrupt).items():
    each = [
      corrupted(record.where(own, attack=name)).values() for name in names
    ]
    error = 1 - mean(corrupted(own).values())
    lines.append((run, *map(spread, each), percent(error)))
  severities = sorted({int(row["eps"]) for row in corrupt})
  return Table(
    "Accuracy under corruptions: percent, mean ± SD of seeds",
    ("run", *names, "mean error"),
    lines,
    f"Severities {', '.join(map(str, severities))}; the mean error over types"
    " and severities isn't divided by another model's.",
  )


def validation(rows: Sequence[Row]) -> Table:
  """Validation accuracies, by which a sweep's parameters are chosen."""
  held = record.where(rows, split="val")
  both = [CLEAN, *attacks(held)[:1]]
  lines = [
    (
      name,
      f"{group.lr:g}",
      str(len({row["seed"] for row in own})),
      *(spread(by_seed(own, kind).values()) for kind in both),
    )
    for name, (group, own) in lines_of(held).items()
  ]
  return Table(
    "Validation accuracy: percent, mean ± SD of seeds",
    ("run", "lr", "seeds", *(kind.name for kind in both)),
    lines,
  )
