"""Rows sorted by what they measure: cells, attacks, curves, runs."""

import collections
import dataclasses
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from statistics import mean
from typing import TypeVar, get_type_hints

from roli_jax import statistics
from roli_jax.results.record import Row

Values = dict[int, float]  # accuracies in [0, 1], by seed

AS_IS = "as_is"  # the stage of weights that nobody has trained here

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
Part = TypeVar("Part", bound="_PartOfRow")


@dataclasses.dataclass(frozen=True, order=True)
class _PartOfRow:
  """Some fields of a row, by which rows are compared and sorted."""

  @classmethod
  def of(cls: type[Part], row: Row) -> Part:
    return cls(**{f.name: row[f.name] for f in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True, order=True)
class Group(_PartOfRow):
  """Cells that differ in their seed alone."""

  weights: str
  train_size: int
  method: str
  init: str
  head_init: str
  stage: str
  steps: int
  lr: float

  @classmethod
  def of(cls, row: Row) -> "Group":
    """Returns the row's; what weights as they are lack is 0 or ""."""
    kinds = get_type_hints(cls)
    return cls(**{field: row.get(field) or kinds[field]() for field in kinds})

  @property
  def name(self) -> str:
    """As people call it: `full RanLI small head`."""
    if self.stage == AS_IS:
      return f"{self.weights}, as it is"
    inits = {"ranli": "RanLI", "roli": "RoLI", "std": "std"}
    name = f"{self.method} {inits[self.init]}"
    if self.stage != "adapt":
      name = f"{self.method} {self.stage} ({inits[self.init]})"
    heads = {"small": " small head", "zeroshot": " zero-shot head"}
    return name + heads.get(self.head_init, "")

  @property
  def is_member(self) -> bool:
    """Whether it is one of an ensemble's frontier, `wise_ft-0.3`."""
    return "-" in self.stage


# Kinds of AutoAttack; at another budget than its own it is `custom`.
_VERSIONS = {
  "fast": "fast (non-standard)",
  "custom": "custom (non-standard)",
  "plus": "plus",
  "rand": "rand",
}


@dataclasses.dataclass(frozen=True, order=True)
class Attacked(_PartOfRow):
  """What was done to the images of a row before they were classified."""

  attack: str
  attack_steps: int | None
  restarts: int | None
  norm: str | None
  eps: float | None

  @property
  def is_corruption(self) -> bool:
    """Whether images were corrupted and not attacked."""
    return self.norm == "severity"

  @property
  def recipe(self) -> str:
    """The attack without its radius: `PGD-20 x 5`."""
    if self.is_corruption:
      return self.attack
    ensemble, *version = self.attack.split("_")
    if ensemble == "autoattack":
      return " ".join(["AutoAttack", *(_VERSIONS[v] for v in version)])
    name = f"{self.attack.upper()}-{self.attack_steps}"
    return name + (f" x {self.restarts}" if (self.restarts or 1) > 1 else "")

  @property
  def name(self) -> str:
    """The attack and its radius, or `clean`, or `corruptions`."""
    if self == CLEAN:
      return "clean"
    if self == CORRUPTIONS:
      return "corruptions"
    return f"{self.recipe} {self.norm} {self.eps:g}"


CLEAN = Attacked("none", None, None, None, None)
# All corruptions, at all severities: no row is of it, see `by_seed`.
CORRUPTIONS = Attacked("corruptions", None, None, "severity", None)


def collect(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
  """Returns items by their key, keys in the order in which they first come."""
  found: dict[K, list[T]] = {}
  for item in items:
    found.setdefault(key(item), []).append(item)
  return found


def by_group(rows: Iterable[Row]) -> dict[Group, list[Row]]:
  """Returns rows by group, groups in the order in which they first come."""
  return collect(rows, Group.of)


def by_run(rows: Iterable[Row]) -> dict[str, list[Row]]:
  """Returns rows by the name of their run, without its seed."""
  return collect(rows, lambda row: re.sub(r"-?\bseed=\d+", "", row["run"]))


def by_seed(rows: Iterable[Row], kind: Attacked) -> Values:
  """Returns each seed's accuracy; of CORRUPTIONS the mean over all of them."""
  if kind != CORRUPTIONS:
    return {r["seed"]: r["value"] for r in rows if Attacked.of(r) == kind}
  corrupted = [row for row in rows if Attacked.of(row).is_corruption]
  values = {
    seed: [row["value"] for row in same]
    for seed, same in collect(corrupted, lambda row: row["seed"]).items()
  }
  return {seed: sum(each) / len(each) for seed, each in values.items()}


def attacks(rows: Iterable[Row]) -> list[Attacked]:
  """Returns the attacks, those on most cells first; no corruptions."""
  counts = collections.Counter(map(Attacked.of, rows))
  return [
    attack
    for attack, _ in counts.most_common()
    if attack != CLEAN and not attack.is_corruption
  ]


def kinds(tests: Sequence[Row]) -> list[Attacked]:
  """Returns what accuracy is shown of: CLEAN, attacks, perhaps CORRUPTIONS.

  Those of a curve are left out: the main attack at other radii, and attacks
  that are called `curve`.
  """
  found = attacks(tests)
  shown = [
    attack
    for attack in found
    if attack.attack != "curve"
    and (
      attack == found[0]
      or dataclasses.replace(attack, eps=found[0].eps) != found[0]
    )
  ]
  has_corruptions = any(Attacked.of(row).is_corruption for row in tests)
  return [CLEAN, *shown, *[CORRUPTIONS] * has_corruptions]


@dataclasses.dataclass(frozen=True)
class Curve:
  """Whose accuracy is known at several radii, and under which attack."""

  group: Group
  seed: int
  recipe: str
  norm: str

  @property
  def name(self) -> str:
    size = f"{self.group.train_size} images, " if self.group.train_size else ""
    return (
      f"{self.group.name}, {self.group.weights}, {size}seed {self.seed},"
      f" {self.recipe}"
    )


def _seed_and_attack(row: Row) -> tuple[int, tuple[str, str] | None]:
  """Returns a row's seed, and its attack but for the radius, if it has one."""
  attack = Attacked.of(row)
  if attack == CLEAN or attack.is_corruption:
    return row["seed"], None
  return row["seed"], (attack.recipe, attack.norm or "")


def measured_curves(tests: Iterable[Row]) -> dict[Curve, dict[float, float]]:
  """Returns accuracy by radius, clean at 0, where there are two radii."""
  found: dict[Curve, dict[float, float]] = {}
  for group, rows in by_group(tests).items():
    clean = by_seed(rows, CLEAN)
    for (seed, attack), same in collect(rows, _seed_and_attack).items():
      points = {row["eps"] or 0.0: row["value"] for row in same}
      if attack and len(points) > 1:
        if seed in clean:
          points[0.0] = clean[seed]
        found[Curve(group, seed, *attack)] = points
  return found


def expected_robustness(points: dict[float, float]) -> float | None:
  """Returns that of a curve, None unless it begins at the clean images."""
  radii = sorted(points)
  if radii[0] != 0:
    return None
  return statistics.expected_robustness(radii, [points[eps] for eps in radii])


def told_apart(group: Group, groups: Iterable[Group]) -> list[str]:
  """Returns the group's name, and the settings in which others differ."""
  alike = [other for other in groups if other.stage == group.stage]
  parts = [group.name]
  if len({other.train_size for other in alike}) > 1:
    parts.append(f"{group.train_size} images")
  if len({other.steps for other in alike}) > 1:
    parts.append(f"{group.steps} steps")
  return parts


def by_step(
  rows: Iterable[Row], logged: Iterable[Row]
) -> dict[Group, dict[int, float]]:
  """Returns the values of a log by group and step, means over seeds.

  Args:
    rows: the rows of results, which say what group a cell is of.
    logged: rows of `training.jsonl`, of one metric.
  """
  groups = {row["cell"]: Group.of(row) for row in rows}
  found: dict[Group, dict[int, list[float]]] = {}
  for row in logged:
    if group := groups.get(row["cell"]):
      changes = {field: row[field] for field in ("stage", "steps", "lr")}
      points = found.setdefault(dataclasses.replace(group, **changes), {})
      points.setdefault(row["step"], []).append(row["value"])
  return {
    group: {step: mean(values) for step, values in points.items()}
    for group, points in found.items()
  }
