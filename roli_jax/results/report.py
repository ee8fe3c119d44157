"""From rows to tables: what was measured, and what can be concluded."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Sequence
from statistics import mean

from roli_jax import data
from roli_jax.evaluate.checks import VERDICTS
from roli_jax.results import comparison, page, record, stated
from roli_jax.results.grouping import (
  AS_IS,
  CLEAN,
  Attacked,
  Group,
  attacks,
  by_group,
  by_seed,
  collect,
  expected_robustness,
  kinds,
  measured_curves,
)
from roli_jax.results.record import Row
from roli_jax.results.tables import Table, filled, percent

_CAVEAT = (
  "All seeds share the same pretrained backbones: what is concluded here holds"
  " for those."
)


def tables(rows: Sequence[Row]) -> list[Table]:
  """Returns all tables that the rows fill."""
  made = (
    accuracies,
    differences,
    comparison.frontier,
    curves,
    comparison.corruptions,
    grid,
  )
  return filled(table(rows) for table in made)


def accuracies(rows: Sequence[Row]) -> Table:
  """Returns each group's test accuracies: mean and spread over seeds."""
  tests = record.where(rows, split="test")
  shown = kinds(tests)
  lines = [
    (
      group.weights,
      group.name,
      str(group.train_size),
      str(group.steps),
      f"{group.lr:g}",
      comparison.num_seeds(own),
      *comparison.spreads(own, shown),
    )
    for group, own in by_group(tests).items()
    if not group.is_member
  ]
  about = ("backbone", "method", "images", "steps", "lr", "seeds")
  header = (*about, *comparison.columns(tests, shown))
  title = "Test accuracy: percent, mean ± SD of seeds"
  return _narrowed(Table(title, header, lines, _CAVEAT))


def differences(rows: Sequence[Row]) -> Table:
  """Returns what RoLI gains, and what linear probing does, paired by seed."""
  tests = record.where(rows, split="test")
  groups = {g: own for g, own in by_group(tests).items() if not g.is_member}
  main = attacks(tests)[:1]
  shown = dict(zip(("clean", "robust"), (CLEAN, *main), strict=False))
  pairs = [
    (
      (_pair(ours, theirs), str(ours.train_size), name),
      by_seed(groups[ours], kind),
      by_seed(groups[theirs], kind),
    )
    for ours, theirs in itertools.product(groups, repeat=2)
    if _are_compared(ours, theirs)
    for name, kind in shown.items()
  ]
  names = ("difference", "images", "accuracy")
  note = f"Robust: {main[0].name if main else ''}. {_CAVEAT}"
  return _narrowed(comparison.paired("Paired differences", names, pairs, note))


def _narrowed(table: Table) -> Table:
  """Returns the table without settings that are the same in all rows."""
  columns = list(zip(table.header, *table.rows, strict=True))
  same = [
    column
    for column in columns
    if column[0] in ("images", "steps") and len(set(column[1:])) == 1
  ]
  others = [column for column in columns if column not in same]
  header, *rows = zip(*others, strict=True)
  settings = ", ".join(f"{value} {name}" for name, value, *_ in same)
  title = table.title + (f" ({settings})" if settings else "")
  return dataclasses.replace(table, title=title, header=header, rows=rows)


def _pair(ours: Group, theirs: Group) -> str:
  """Returns what is compared: `full RoLI − full RanLI, robust`."""
  if ours.weights != theirs.weights:
    return f"{ours.name}: {ours.weights} − {theirs.weights}"
  steps = f" of {theirs.steps} steps" if theirs.steps != ours.steps else ""
  return f"{ours.name} − {theirs.name}{steps}, {ours.weights}"


def _are_compared(ours: Group, theirs: Group) -> bool:
  """Returns whether a difference of theirs from ours answers a question.

  RoLI against what else its method starts from, and against the probe; full
  fine-tuning against other methods; linear probing against RanLI; a method on
  the robust backbone against the same on the standard one. From the small head
  only against what starts from one too.
  """
  if (ours.weights, theirs.weights) == ("robust", "standard"):
    # Each backbone has a best learning rate of its own.
    mine, other = (
      dataclasses.replace(group, weights="", lr=0.0) for group in (ours, theirs)
    )
    return mine == other
  setting = (ours.weights, ours.train_size)
  if (theirs.weights, theirs.train_size) != setting:
    return False
  if ours.head_init == "small" and theirs.head_init != "small":
    return False
  if (ours.stage, ours.init) == ("probe", "roli"):
    return theirs.init == "ranli"
  rival = theirs.method in (ours.method, "linear")
  rival |= (ours.method, theirs.init) == ("full", "roli")
  is_roli = (ours.stage, ours.init) == ("adapt", "roli")
  return is_roli and rival and theirs != ours


def curves(rows: Sequence[Row]) -> Table:
  """Returns accuracy against the radius, where it was measured at several."""
  found = measured_curves(record.where(rows, split="test"))
  radii = {(curve.norm, eps) for curve in found for eps in found[curve]}
  lines = []
  for norm, eps in sorted(radii):
    values = [
      points.get(eps) if curve.norm == norm else None
      for curve, points in found.items()
    ]
    lines.append((f"{eps:g}", *map(_percent_or_empty, values)))
  means = [expected_robustness(points) for points in found.values()]
  if any(value is not None for value in means):
    lines.append(("mean", *map(_percent_or_empty, means)))
  return Table(
    "Test accuracy against eps: percent",
    ("eps", *(curve.name for curve in found)),
    lines,
    "mean: expected robustness, over all radii from 0 on, by trapezia.",
  )


def _percent_or_empty(value: float | None) -> str:
  return "" if value is None else percent(value)


def evaluations(kept: Iterable[Row]) -> list[Table]:
  """Returns what ensembles and searches broke, and what their checks found.

  Args:
    kept: summaries of results, each with its row of results as `row`.
  """
  lines, checks = [], []
  for summary in kept:
    row = summary["row"]
    attack = f"{Attacked.of(row).recipe} {row['norm']} {summary['eps']:g}"
    broken = [
      f"{name} {count}"
      for name, count in summary["broken_by"].items()
      if name not in ("", "clean")
    ]
    robust, low, high = (
      percent(summary["robust"][name]) for name in ("value", "low", "high")
    )
    passes = summary["passes"]
    cells = (
      row["cell"],
      attack,
      str(summary["n"]),
      percent(summary["clean"]["value"]),
      f"{robust} [{low}, {high}]",
      ", ".join(broken) or "none",
      f"{passes['forward']:,} / {passes['backward']:,}",
      f"{summary['seconds']:.0f}",
      "; ".join(summary["notes"]),
    )
    lines.append(cells)
    checks += [
      (row["cell"], attack, name, check["verdict"], *_seen(check))
      for name, check in summary["checks"].items()
    ]
  about = ("cell", "attack", "images", "clean", "robust [95% Wilson]")
  spent = ("passes forward / backward", "seconds", "notes")
  broke = Table(
    "Evaluations: what each attack broke",
    (*about, "broken by", *spent),
    lines,
    "Each attack sees what those before it left. Percent of all images.",
  )
  checked = Table(
    "Checks: is the number to be trusted?",
    ("cell", "attack", "check", "verdict", *_SEEN),
    checks,
  )
  return filled([broke, checked])


def quick(path: pathlib.Path) -> Table:
  """Returns the checks of a run's other tests, the worst of each.

  Args:
    path: the run's directory.
  """
  files = sorted((path / "evaluations").rglob("checks-*.json"))
  found = [
    (name, check, kept["row"])
    for kept in (json.loads(file.read_text()) for file in files)
    for name, check in kept["checks"].items()
  ]
  lines = []
  for name, each in collect(found, lambda found: found[0]).items():
    verdicts = [check["verdict"] for _, check, _ in each]
    worst = max(verdicts, key=VERDICTS.index)
    _, check, row = each[verdicts.index(worst)]
    tests = f"{verdicts.count(worst)} of {len(each)}"
    lines.append(
      (name, worst, tests, row["cell"], row["attack"], *_seen(check))
    )
  return Table(
    "Checks of the other tests: is the number to be trusted?",
    ("check", "worst verdict", "tests", "one of them", "attack", *_SEEN),
    lines,
  )


# The last columns of a table of checks, and `_seen` their cells.
_SEEN = ("what was seen", "images")


def _seen(check: Row) -> tuple[str, str]:
  return check["said"], _some(check["images"])


def _some(images: Sequence[int], most: int = 8) -> str:
  """Returns the numbers of some images, for a cell."""
  more = f" and {len(images) - most} more" if len(images) > most else ""
  return " ".join(map(str, images[:most])) + more


def kept(path: pathlib.Path) -> list[Row]:
  """Returns the summaries of a run's evaluations.

  Args:
    path: the run's directory.
  """
  files = sorted((path / "evaluations").rglob("summary.json"))
  return [json.loads(file.read_text()) for file in files]


def facts(path: pathlib.Path) -> list[Table]:
  """Returns what a run trains, and on what, from `facts.json` if it is there.

  Args:
    path: the run's directory.
  """
  file = path / "facts.json"
  if not file.is_file():
    return []
  known = json.loads(file.read_text())
  assumed = _assumed(known.get("assumed", {}))
  if "parameters" not in known:  # of weights that no run has trained
    return filled([assumed])
  sizes = []
  by_size = sorted(known["parameters"].items(), key=lambda item: item[1])
  for method, (trained, total) in by_size:
    share = f"{100 * trained / total:.3g}"
    sizes.append((method, f"{trained:,}", f"{total - trained:,}", share))
  title = f"Parameters of {known['backbone']} and its head"
  header = ("method", "trained", "frozen", "percent trained")
  return [Table(title, header, sizes), *filled([assumed]), *_manifest(known)]


def _assumed(by_weights: Row) -> Table:
  """Returns what files of weights couldn't tell, and nobody has."""
  lines = [
    (weights, fact, value)
    for weights, assumed in by_weights.items()
    for fact, value in assumed.items()
  ]
  return Table(
    "Assumed of weights, since their files can't tell",
    ("weights", "what", "assumed"),
    lines,
  )


def _manifest(known: Row) -> list[Table]:
  """Returns the images by class and split, of files or where notes are."""
  if not (known["in_files"] or known["notes"]):
    return []
  by_class: dict[str, dict[str, int]] = {}
  totals: dict[str, int] = dict.fromkeys(data.SPLITS, 0)
  for split, name, count in known["manifest"]:
    by_class.setdefault(name, {})[split] = count
    totals[split] += count
  counts = [*by_class.items(), ("all", totals), ("skipped", known["skipped"])]
  lines = [
    (name, *(str(images.get(split, 0)) for split in data.SPLITS))
    for name, images in counts
  ]
  note = "; ".join(known["notes"])
  return [Table("Images by class", ("class", *data.SPLITS), lines, note)]


def grid(rows: Sequence[Row]) -> Table:
  """Returns validation accuracy at each learning rate, where there are several.

  Under attack, but for the clean probe, which is chosen by clean accuracy.
  """
  held_out = record.where(rows, split="val")
  rates: dict[Group, dict[float, list[float]]] = {}
  for group, own in by_group(held_out).items():
    is_clean = (group.stage, group.init) == ("probe", "std")
    kind = CLEAN if is_clean else attacks(held_out)[0]
    tried = rates.setdefault(dataclasses.replace(group, lr=0.0), {})
    tried[group.lr] = list(by_seed(own, kind).values())
  lines = []
  for group, tried in rates.items():
    if len(tried) > 1:
      best = max(tried, key=lambda lr: mean(tried[lr]))
      cells = [
        f"{lr:g}: {percent(mean(values))}" + " (chosen)" * (lr == best)
        for lr, values in sorted(tried.items())
      ]
      setting = (str(group.train_size), str(group.steps), str(len(tried[best])))
      lines.append((group.weights, group.name, *setting, "; ".join(cells)))
  return Table(
    "Learning rates: validation accuracy, percent, mean of seeds",
    ("backbone", "method", "images", "steps", "seeds", "rate: accuracy"),
    lines,
    "Under attack, but for the clean probe (std), which is chosen by clean"
    " accuracy. Of equal rates the smallest is chosen.",
  )


def write_sweep(path: pathlib.Path) -> list[Table]:
  """Writes the reports and figures of a sweep, from its merged rows.

  Args:
    path: the sweep's directory.

  Raises:
    ValueError: there are no rows.
  """
  from roli_jax.results import figures

  rows = _rows(path)
  drawn = figures.write_sweep(rows, path / "figures")
  return _written(path, comparison.tables(rows), drawn)


def write(path: pathlib.Path) -> list[Table]:
  """Writes the reports and figures of a run's directory, from its rows.

  Args:
    path: the run's directory.

  Raises:
    ValueError: there are no rows.
  """
  from roli_jax.results import figures

  rows, evaluated = _rows(path), kept(path)
  log = record.read(path / "training.jsonl")
  trained = [row for row in rows if row["stage"] != AS_IS]
  drawn = figures.write(trained, log, path / "figures", evaluated)
  checked = filled([quick(path)])
  made = [*tables(trained), *filled([stated.table(rows)])]
  made += [*evaluations(evaluated), *facts(path), *checked]
  return _written(path, made, drawn)


def _rows(path: pathlib.Path) -> list[Row]:
  rows = record.read(path / "results.jsonl")
  if not rows:
    raise ValueError(f"there are no rows in {path / 'results.jsonl'}")
  return rows


def _written(
  path: pathlib.Path, tables: list[Table], drawn: Iterable[pathlib.Path]
) -> list[Table]:
  """Writes `report.md` and `report.html`; returns the tables."""
  parts = [f"# {path.name}", "", *(table.markdown() for table in tables)]
  parts += [f"![{file.stem}](figures/{file.name})\n" for file in drawn]
  (path / "report.md").write_text("\n".join(parts))
  page.write(path, tables)
  return tables
