"""Many runs side by side, paired by seed, and what one run compares beside."""

import re
import statistics
from collections.abc import Iterable, Sequence

from roli_jax import metrics, record
from roli_jax.groups import (
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
from roli_jax.tabular import Table, percent, spread

Values = dict[int, float]  # by seed


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
  """Each run minus the first, paired by seed, with bootstrap intervals."""
  tests = record.where(rows, split="test")
  if not tests:
    return Table("", (), ())
  every = lines_of(tests)
  adapted = [name for name, (of, _) in every.items() if of.stage != "probe"]
  names = adapted or list(every)
  found = {name: every[name][1] for name in names}
  first, *others = names
  lines = []
  for name in others:
    for said, kind in kinds(tests).items():
      ours, theirs = (values(found[run], kind) for run in (name, first))
      seeds = sorted(ours.keys() & theirs.keys())
      if len(seeds) < 2:
        continue
      each = [100 * (ours[seed] - theirs[seed]) for seed in seeds]
      low, high = metrics.bootstrap(each)
      lines.append((
          name, said, f"{statistics.mean(each):+.1f}",
          f"[{low:+.1f}, {high:+.1f}]", " ".join(f"{x:+.1f}" for x in each),
      ))  # fmt: skip
  return Table(
    f"Differences from {first}",
    ("run", "accuracy", "mean", "95% interval", "each seed"),
    lines,
    "In points, paired by seed. Percentile bootstrap of the mean over seeds,"
    " 10,000 draws: of few seeds it is too narrow. Not corrected for the number"
    " of comparisons.",
  )


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
        value = metrics.expected_robustness(radii, [points[e] for e in radii])
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
    error = 1 - statistics.mean(corrupted(own).values())
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
