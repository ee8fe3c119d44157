"""From rows to tables: what was measured, and what can be concluded."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from statistics import mean

from roli_jax import data, statistics
from roli_jax.evaluate.checks import VERDICTS
from roli_jax.results import comparison, record
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

_CAVEAT = (
  "All seeds share the same pretrained backbones: what is concluded here holds"
  " for those."
)


def tables(rows: Sequence[Row]) -> list[Table]:
  """All tables that the rows fill."""
  made = [
    accuracies(rows), differences(rows), comparison.frontier(rows),
    curves(rows), comparison.corruptions(rows), grid(rows),
  ]  # fmt: skip
  return [table for table in made if table.rows]


def accuracies(rows: Sequence[Row]) -> Table:
  """Each group's accuracies on the test set: mean and spread over seeds."""
  tests = record.where(rows, split="test")
  shown = [attack for attack in attacks(tests) if not is_curve(attack, tests)]
  lines = []
  has_corruptions = any(Attacked.of(row).is_corruption for row in tests)
  for group, own in by_group(tests).items():
    if is_member(group):
      continue
    cells = [
      group.weights,
      group.name,
      str(group.train_size),
      str(group.steps),
      f"{group.lr:g}",
      str(len({row["seed"] for row in own})),
      spread(by_seed(own, CLEAN).values()),
      *(spread(by_seed(own, attack).values()) for attack in shown),
      *[spread(corrupted(own).values())] * has_corruptions,
    ]
    lines.append(tuple(cells))
  names = (attack.name + _fewer(attack, tests) for attack in shown)
  header = ("backbone", "method", "images", "steps", "lr", "seeds", "clean",
            *names, *["corruptions"] * has_corruptions)  # fmt: skip
  return _narrowed(
    Table("Test accuracy: percent, mean ± SD of seeds", header, lines, _CAVEAT)
  )


def _fewer(attack: "Attacked", tests: Sequence[Row]) -> str:
  """How many images, where they are not those of the main attack."""
  counts = {
    of: sorted({row["n"] for row in tests if Attacked.of(row) == of})
    for of in (attack, attacks(tests)[0])
  }
  own, main = counts.values() if len(counts) == 2 else [*counts.values()] * 2
  return "" if own == main else f", {own[0]} images"


def differences(rows: Sequence[Row]) -> Table:
  """What RoLI gains, and what linear probing does, paired by seed."""
  tests = record.where(rows, split="test")
  groups = {g: of for g, of in by_group(tests).items() if not is_member(g)}
  kinds = dict(zip(("clean", "robust"), (CLEAN, *attacks(tests)), strict=False))
  pairs = [
    (
      (_pair(ours, theirs), str(ours.train_size), kind),
      by_seed(groups[ours], attack),
      by_seed(groups[theirs], attack),
    )
    for ours, theirs in _pairs(list(groups))
    for kind, attack in kinds.items()
  ]
  main = attacks(tests)[0].name if attacks(tests) else ""
  names = ("difference", "images", "accuracy")
  note = f"Robust: {main}. {_CAVEAT}"
  return _narrowed(comparison.paired("Paired differences", names, pairs, note))


def _narrowed(table: Table) -> Table:
  """Without the columns of settings that are the same in all rows."""
  columns = dict(zip(table.header, zip(*table.rows, strict=True), strict=False))
  same = {
    name: columns[name][0]
    for name in ("images", "steps")
    if len(set(columns.get(name, ()))) == 1
  }
  kept = [i for i, name in enumerate(table.header) if name not in same]
  said = ", ".join(f"{value} {name}" for name, value in same.items())
  return Table(
    table.title + (f" ({said})" if said else ""),
    tuple(table.header[i] for i in kept),
    [tuple(row[i] for i in kept) for row in table.rows],
    table.note,
  )


def _pair(ours: "Group", theirs: "Group") -> str:
  """What is compared: `full RoLI − full RanLI, robust`."""
  if ours.weights != theirs.weights:
    return f"{ours.name}: {ours.weights} − {theirs.weights}"
  steps = f" of {theirs.steps} steps" if theirs.steps != ours.steps else ""
  return f"{ours.name} − {theirs.name}{steps}, {ours.weights}"


def _pairs(groups: list["Group"]) -> Iterator[tuple["Group", "Group"]]:
  """What is compared, robust or not.

  RoLI against what else its method starts from, and against the probe; full
  fine-tuning against other methods; linear probing against RanLI. From the
  small head only against what starts from one too.
  """
  for ours in groups:
    for theirs in groups:
      setting = (ours.weights, ours.train_size)
      if (theirs.weights, theirs.train_size) == setting:
        if ours.head_init == "small" and theirs.head_init != "small":
          continue
        is_roli = (ours.stage, ours.init) == ("adapt", "roli")
        rival = theirs.method in (ours.method, "linear")
        rival |= (ours.method, theirs.init) == ("full", "roli")
        is_probe = (ours.stage, ours.init) == ("probe", "roli")
        if is_roli and rival and theirs != ours:
          yield ours, theirs
        if is_probe and theirs.init == "ranli":
          yield ours, theirs
      elif (ours.weights, theirs.weights) == ("robust", "standard"):
        mine = dataclasses.replace(ours, weights="", lr=0.0)
        if mine == dataclasses.replace(theirs, weights="", lr=0.0):
          yield ours, theirs


def curves(rows: Sequence[Row]) -> Table:
  """Accuracy against the radius, where it was measured at several."""
  found = curved(record.where(rows, split="test"))
  header = tuple(curve.name for curve in found)
  radii = sorted({(c.norm, eps) for c, of in found.items() for eps in of})
  lines = []
  for norm, eps in radii:
    values = [
      of.get(eps) if curve.norm == norm else None for curve, of in found.items()
    ]
    cells = [percent(value) if value is not None else "" for value in values]
    lines.append((f"{eps:g}", *cells))
  means = [_expected(of) for of in found.values()]
  if lines and any(means):
    lines.append(("mean", *means))
  note = "mean: expected robustness, over all radii from 0 on, by trapezia."
  return Table(
    "Test accuracy against eps: percent", ("eps", *header), lines, note
  )


def _expected(points: dict[float, float]) -> str:
  """Expected robustness of a curve, if it begins at the clean images."""
  radii = sorted(points)
  if radii[0]:
    return ""
  accuracies = [points[eps] for eps in radii]
  return percent(statistics.expected_robustness(radii, accuracies))


def evaluations(kept: Iterable[Row]) -> list[Table]:
  """What ensembles and searches broke, and what there is to say about them.

  Args:
    kept: summaries of results, each with the `row` that it is of.
  """
  lines, checks = [], []
  for summary in kept:
    row = summary["row"]
    attack = Attacked.of({**row, "value": None})
    robust = summary["robust"]
    broken = {
      name: count
      for name, count in summary["broken_by"].items()
      if name not in ("", "clean")
    }
    passes = summary["passes"]
    lines.append((
        row["cell"],
        f"{attack.recipe} {row['norm']} {summary['eps']:g}",
        str(summary["n"]),
        percent(summary["clean"]["value"]),
        f"{percent(robust['value'])} [{percent(robust['low'])},"
        f" {percent(robust['high'])}]",
        ", ".join(f"{name} {n}" for name, n in broken.items()) or "none",
        f"{passes['forward']:,} / {passes['backward']:,}",
        f"{summary['seconds']:.0f}",
        "; ".join(summary["notes"]),
    ))  # fmt: skip
    checks += [
      (row["cell"], lines[-1][1], name, check["verdict"], check["said"],
       _some(check["images"]))
      for name, check in summary["checks"].items()
    ]  # fmt: skip
  made = [
    Table(
      "Evaluations: what each attack broke",
      ("cell", "attack", "images", "clean", "robust [95% Wilson]", "broken by",
       "passes forward / backward", "seconds", "notes"),
      lines,
      "Each attack sees what those before it left. Percent of all images.",
    ),
    Table(
      "Checks: is the number to be trusted?",
      ("cell", "attack", "check", "verdict", "what was seen", "images"),
      checks,
    ),
  ]  # fmt: skip
  return [table for table in made if table.rows]


def quick(path: pathlib.Path) -> Table:
  """What the checks of a run's other tests say, the worst of each.

  Args:
    path: the run's directory.
  """
  files = sorted((path / "evaluations").rglob("checks-*.json"))
  found: dict[str, list[tuple[int, Row, Row]]] = {}
  for file in files:
    kept = json.loads(file.read_text())
    for name, check in kept["checks"].items():
      rank = VERDICTS.index(check["verdict"])
      found.setdefault(name, []).append((rank, check, kept["row"]))
  lines = []
  for name, each in found.items():
    rank, check, row = max(each, key=lambda one: one[0])
    of = sum(one[0] == rank for one in each)
    lines.append(
      (
        name,
        check["verdict"],
        f"{of} of {len(each)}",
        row["cell"],
        row["attack"],
        check["said"],
        _some(check["images"]),
      )
    )
  return Table(
    "Checks of the other tests: is the number to be trusted?",
    ("check", "worst verdict", "tests", "one of them", "attack",
     "what was seen", "images"),
    lines,
  )  # fmt: skip


def _some(images: Sequence[int], most: int = 8) -> str:
  more = f" and {len(images) - most} more" if len(images) > most else ""
  return " ".join(map(str, images[:most])) + more


def kept(path: pathlib.Path) -> list[Row]:
  """The summaries of a run's evaluations."""
  files = sorted((path / "evaluations").rglob("summary.json"))
  return [json.loads(file.read_text()) for file in files]


def facts(path: pathlib.Path) -> list[Table]:
  """What a run trains, and on what: of `facts.json`, where it is."""
  file = path / "facts.json"
  if not file.is_file():
    return []
  known = json.loads(file.read_text())
  by_size = sorted(known["parameters"].items(), key=lambda item: item[1])
  sizes = [
    (method, f"{trained:,}", f"{total - trained:,}",
     f"{100 * trained / total:.3g}")
    for method, (trained, total) in by_size
  ]  # fmt: skip
  title = f"Parameters of {known['backbone']} and its head"
  header = ("method", "trained", "frozen", "percent trained")
  return [Table(title, header, sizes), *_manifest(known)]


def _manifest(known: Row) -> list[Table]:
  """Images by class and split, of data sets of files."""
  if not known["in_files"]:
    return []
  counts: dict[str, dict[str, int]] = {}
  for split, name, count in known["manifest"]:
    counts.setdefault(name, {})[split] = count
  splits = list(data.SPLITS)
  lines = [
    (name, *(str(of.get(split, 0)) for split in splits))
    for name, of in counts.items()
  ]
  for what, of in (
    ("all", {s: sum(c.get(s, 0) for c in counts.values()) for s in splits}),
    ("skipped", known["skipped"]),
  ):
    lines.append((what, *(str(of[split]) for split in splits)))
  note = "; ".join(known["notes"])
  return [Table("Images by class", ("class", *splits), lines, note)]


def grid(rows: Sequence[Row]) -> Table:
  """Validation accuracy at each learning rate, where there are several."""
  vals = record.where(rows, split="val")
  rates: dict[Group, dict[float, list[float]]] = {}
  for group, own in by_group(vals).items():
    attack = CLEAN if (group.stage, group.init) == ("probe", "std") else None
    values = by_seed(own, attack or attacks(vals)[0]).values()
    same = dataclasses.replace(group, lr=0.0)
    rates.setdefault(same, {})[group.lr] = list(values)
  lines = []
  for group, of in rates.items():
    if len(of) > 1:
      best = max(of, key=lambda lr: mean(of[lr]))
      cells = [
        f"{lr:g}: {percent(mean(values))}" + (" (chosen)" if lr == best else "")
        for lr, values in sorted(of.items())
      ]
      lines.append((
          group.weights, group.name, str(group.train_size), str(group.steps),
          str(len(of[best])), "; ".join(cells),
      ))  # fmt: skip
  return Table(
    "Learning rates: validation accuracy, percent, mean of seeds",
    ("backbone", "method", "images", "steps", "seeds", "rate: accuracy"),
    lines,
    "Under attack, but for the clean probe (std), which is chosen by clean"
    " accuracy. Of equal rates the smallest is chosen.",
  )


def write_sweep(path: pathlib.Path) -> list[Table]:
  """Writes `report.md` and the figures of a sweep, from its merged rows.

  Raises:
    ValueError: there are no rows.
  """
  from roli_jax.results import figures

  rows = record.read(path / "results.jsonl")
  if not rows:
    raise ValueError(f"there are no rows in {path / 'results.jsonl'}")
  made = comparison.tables(rows)
  return _written(path, made, figures.write_sweep(rows, path / "figures"))


def write(path: pathlib.Path) -> list[Table]:
  """Writes `report.md` and the figures of a run's directory, from its rows.

  Raises:
    ValueError: there are no rows.
  """
  from roli_jax.results import figures

  rows = record.read(path / "results.jsonl")
  if not rows:
    raise ValueError(f"there are no rows in {path / 'results.jsonl'}")
  evaluated = kept(path)
  made = [*tables(rows), *evaluations(evaluated), *facts(path)]
  checked = quick(path)
  made += [checked] if checked.rows else []
  drawn = figures.write(
    rows,
    record.read(path / "training.jsonl"),
    path / "figures",
    evaluated,
  )
  return _written(path, made, drawn)


def _written(path, tables, drawn):
  """The tables, after they went to `report.md` with the figures below."""
  parts = [f"# {path.name}", "", *(table.markdown() for table in tables)]
  parts += [f"![{f.stem}](figures/{f.name})\n" for f in drawn]
  (path / "report.md").write_text("\n".join(parts))
  return tables
