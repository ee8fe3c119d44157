"""Many runs side by side, paired by seed, and what one run compares beside."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from statistics import mean

from roli_jax import statistics
from roli_jax.results import record
from roli_jax.results.grouping import (
  CLEAN,
  CORRUPTIONS,
  Attacked,
  Group,
  Values,
  attacks,
  by_group,
  by_run,
  by_seed,
  collect,
  expected_robustness,
  kinds,
  measured_curves,
)
from roli_jax.results.record import Row
from roli_jax.results.tables import Table, filled, percent, spread

_LEVEL = 0.05  # of error, at which two are called separated
# The last columns of a table of differences; `_judged` writes their cells.
_JUDGED = ("mean", "95% Student interval", "each seed", "p_holm", "verdict")


def tables(rows: Sequence[Row]) -> list[Table]:
  """Returns a sweep's tables: its runs' accuracies, and how they differ."""
  made = (accuracies, differences, frontier, expected, corruptions, validation)
  return filled(table(rows) for table in made)


# By what groups of one name are told apart, as far as it takes.
_SETTINGS: dict[str, Callable[[Group], str]] = {
  "weights": lambda group: f"weights {group.weights}",
  "train_size": lambda group: f"{group.train_size} training images",
  "head_init": lambda group: f"head {group.head_init}",
  "steps": lambda group: f"{group.steps} steps",
  "lr": lambda group: f"lr {group.lr:g}",
}


def by_name(rows: Sequence[Row]) -> dict[str, tuple[Group, list[Row]]]:
  """Returns what is compared, by name: runs that differ in their seed are one.

  A probe that several runs share stands once.
  """
  found: list[tuple[str, Group, list[Row]]] = []
  seen = set()
  for run, of_run in by_run(rows).items():
    groups = {g: own for g, own in by_group(of_run).items() if not g.is_member}
    adapted = [group for group in groups if group.stage != "probe"]
    for group, own in groups.items():
      name = group.name
      if group.stage != "probe":
        alone = run and len(adapted) == 1
        name = run if alone else f"{run}: {name}".removeprefix(": ")
      elif group in seen:
        continue
      seen.add(group)
      found.append((name, group, own))
  by_base = collect(found, lambda entry: entry[0])

  def full(name: str, group: Group) -> str:
    alike = [other for _, other, _ in by_base[name]]
    return ", ".join([name, *_told_apart(group, alike)])

  return {full(name, group): (group, own) for name, group, own in found}


def _told_apart(group: Group, alike: Sequence[Group]) -> list[str]:
  """Returns the group's settings that tell it from those of the same name."""
  chosen: list[str] = []
  for field in _SETTINGS:
    values = {tuple(getattr(g, f) for f in chosen) for g in alike}
    if len(values) < len(alike) and len({getattr(g, field) for g in alike}) > 1:
      chosen.append(field)
  return [_SETTINGS[field](group) for field in chosen]


def spreads(rows: Sequence[Row], shown: Iterable[Attacked]) -> list[str]:
  """Returns a cell for each kind of accuracy: mean and spread over seeds."""
  return [spread(by_seed(rows, kind).values()) for kind in shown]


def columns(tests: Sequence[Row], shown: Sequence[Attacked]) -> list[str]:
  """Returns the names of kinds of accuracy; of fewer images, with their count.

  Where cells differ in their count, it is the least.
  """
  counts = [
    sorted({row["n"] for row in tests if Attacked.of(row) == kind})
    for kind in shown
  ]
  most = max(itertools.chain(*counts), default=0)
  return [
    kind.name + (f", {each[0]} images" if each and each != [most] else "")
    for kind, each in zip(shown, counts, strict=True)
  ]


def num_seeds(rows: Iterable[Row]) -> str:
  """Returns the number of seeds, as a cell."""
  return str(len({row["seed"] for row in rows}))


def _runs_table(
  rows: Sequence[Row],
  shown: Sequence[Attacked],
  title: str,
  names: Iterable[str],
  note: str = "",
) -> Table:
  """Returns the table of each run's accuracies, a column for each kind."""
  lines = [
    (name, f"{group.lr:g}", num_seeds(own), *spreads(own, shown))
    for name, (group, own) in by_name(rows).items()
  ]
  title = f"{title}: percent, mean ± SD of seeds"
  return Table(title, ("run", "lr", "seeds", *names), lines, note)


def accuracies(rows: Sequence[Row]) -> Table:
  """Returns each run's test accuracies: mean and spread over seeds."""
  tests = record.where(rows, split="test")
  shown = kinds(tests)
  note = "Attacks that not all runs or seeds have seen say so by their gaps."
  names = columns(tests, shown)
  return _runs_table(tests, shown, "Test accuracy", names, note)


def validation(rows: Sequence[Row]) -> Table:
  """Returns validation accuracies, by which a sweep's parameters are chosen."""
  held_out = record.where(rows, split="val")
  shown = [CLEAN, *attacks(held_out)[:1]]
  names = [kind.name for kind in shown]
  return _runs_table(held_out, shown, "Validation accuracy", names)


def differences(rows: Sequence[Row]) -> Table:
  """Returns each run minus the first, paired by seed, in each accuracy."""
  tests = record.where(rows, split="test")
  if not tests:
    return Table("", (), ())
  every = by_name(tests)
  adapted = [
    name for name, (group, _) in every.items() if group.stage != "probe"
  ]
  first, *others = adapted or list(every)
  base = every[first][1]
  pairs = [
    ((name, kind.name), by_seed(every[name][1], kind), by_seed(base, kind))
    for name in others
    for kind in kinds(tests)
  ]
  return paired(f"Differences from {first}", ("run", "accuracy"), pairs)


def paired(
  title: str,
  names: tuple[str, ...],
  pairs: Iterable[tuple[tuple[str, ...], Values, Values]],
  note: str = "",
) -> Table:
  """Returns the difference of each pair: all tables of differences call this.

  Only seeds that both sides have count. A pair has no line where one of its
  sides was not measured at all.

  Args:
    title: the title of the table.
    names: the names of the columns that identify a pair.
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
  count = sum(not math.isnan(p_holm) for p_holm in corrected)
  method = (
    "In points, paired by the seeds that both have. The interval is Student's"
    " with seeds - 1 degrees of freedom, of each line alone; p_holm is the p"
    f" value after Holm's correction for the {count} comparisons of this table."
    f" A verdict says what it rests on: p_holm below {_LEVEL:g}, or the"
    " interval only, which chance gives one line in twenty."
  )
  return Table(title, (*names, *_JUDGED), lines, f"{method} {note}".strip())


def _points(ours: Values, theirs: Values) -> list[float]:
  """Returns differences in points, of the seeds that both have.

  Rounded, so that accuracies that differ alike have equal differences: what
  floating point leaves between them would pass for a spread.
  """
  seeds = sorted(ours.keys() & theirs.keys())
  return [round(100 * (ours[seed] - theirs[seed]), 9) for seed in seeds]


def _judged(points: list[float], p_holm: float) -> tuple[str, ...]:
  """Returns mean, interval, each seed, corrected p value and verdict."""
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


@dataclasses.dataclass(frozen=True)
class Interval:
  """A line of a table of differences, in points.

  Attributes:
    name: what is compared.
    mean: the mean difference.
    low: the lower end of its 95% Student interval.
    high: the upper end.
    verdict: whether the two are separated.
  """

  name: str
  mean: float
  low: float
  high: float
  verdict: str


def intervals(table: Table) -> list[Interval]:
  """Returns the lines of a table of `paired` that have an interval."""
  found: list[Interval] = []
  if table.header[-len(_JUDGED) :] != _JUDGED:
    return found
  for *names, middle, interval, _, _, verdict in table.rows:
    if interval:
      low, high = map(float, interval.strip("[]").split(", "))
      *compared, accuracy = filter(None, names)
      name = f"{', '.join(compared)}: {accuracy}"
      found.append(Interval(name, float(middle), low, high, verdict))
  return found


def _verdict(
  points: list[float], low: float, high: float, p_holm: float
) -> str:
  """Returns whether the two are separated, and by p_holm or the interval."""
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
  """Returns accuracies of ensembles, at every alpha.

  An ensemble joins what a stage started from, alpha 0, and what it ended at.
  """
  tests = record.where(rows, split="test")
  shown = (CLEAN, *attacks(tests)[:1])
  lines = [
    (
      f"{run}: {group.method}, {group.weights}",
      *group.stage.split("-"),
      *spreads(own, shown),
    )
    for run, of_run in by_run(tests).items()
    for group, own in by_group(of_run).items()
    if group.is_member
  ]
  return Table(
    "Ensembles by alpha: percent, mean ± SD of seeds",
    ("of", "ensemble", "alpha", *(kind.name for kind in shown)),
    lines,
    "alpha 0: what the stage started from; 1: what it ended at.",
  )


def expected(rows: Sequence[Row]) -> Table:
  """Returns expected robustness, where accuracy is known at several radii."""
  tests = record.where(rows, split="test")
  lines = []
  for run, of_run in by_run(tests).items():
    for curve, points in measured_curves(of_run).items():
      value = expected_robustness(points)
      if value is not None and not curve.group.is_member:
        about = (run, curve.group.name, str(curve.seed), curve.recipe)
        largest = f"{max(points):g} {curve.norm}"
        lines.append((*about, largest, percent(value)))
  return Table(
    "Expected robustness: percent",
    ("run", "method", "seed", "attack", "up to", "mean accuracy"),
    lines,
    "The mean accuracy over the radii from 0, by trapezia.",
  )


def corruptions(rows: Sequence[Row]) -> Table:
  """Returns accuracy under each corruption, over severities and seeds."""
  tests = record.where(rows, split="test")
  corrupted = [row for row in tests if Attacked.of(row).is_corruption]
  names = sorted({row["attack"] for row in corrupted})
  lines = []
  for run, (_, own) in by_name(corrupted).items():
    each = [
      by_seed(record.where(own, attack=name), CORRUPTIONS) for name in names
    ]
    cells = [spread(values.values()) for values in each]
    error = 1 - mean(by_seed(own, CORRUPTIONS).values())
    lines.append((run, *cells, percent(error)))
  severities = sorted({int(row["eps"]) for row in corrupted})
  return Table(
    "Accuracy under corruptions: percent, mean ± SD of seeds",
    ("run", *names, "mean error"),
    lines,
    f"Severities {', '.join(map(str, severities))}; the mean error over types"
    " and severities isn't divided by another model's.",
  )
