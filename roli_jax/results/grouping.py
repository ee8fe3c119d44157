"""What rows are of: cells that differ in their seed alone, attacks, curves."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, order=True)
class Group:
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
    return cls(**{f.name: row[f.name] for f in dataclasses.fields(cls)})

  @property
  def name(self) -> str:
    """As people call it: `full RanLI (small head)`."""
    inits = {"ranli": "RanLI", "roli": "RoLI", "std": "std"}
    name = f"{self.method} {inits[self.init]}"
    if self.stage != "adapt":
      name = f"{self.method} {self.stage} ({inits[self.init]})"
    heads = {"small": " small head", "zeroshot": " zero-shot head"}
    return name + heads.get(self.head_init, "")


@dataclasses.dataclass(frozen=True, order=True)
class Attacked:
  """What a row's images went through."""

  attack: str
  attack_steps: int | None
  restarts: int | None
  norm: str | None
  eps: float | None

  @classmethod
  def of(cls, row: Row) -> "Attacked":
    return cls(**{f.name: row[f.name] for f in dataclasses.fields(cls)})

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
    if self == CLEAN:
      return "clean"
    return f"{self.recipe} {self.norm} {self.eps:g}"


# Of AutoAttack; at a budget of one's own it is `custom`.
_VERSIONS = {
  "fast": "fast (non-standard)",
  "custom": "custom (non-standard)",
  "plus": "plus",
  "rand": "rand",
}

CLEAN = Attacked("none", None, None, None, None)


def attacks(rows: Iterable[Row]) -> list[Attacked]:
  """The attacks, those on most cells first; no corruptions."""
  counts = collections.Counter(Attacked.of(row) for row in rows)
  return [
    attack
    for attack, _ in counts.most_common()
    if attack != CLEAN and not attack.is_corruption
  ]


def is_curve(attack: Attacked, tests: Iterable[Row]) -> bool:
  """Whether it is the main attack at another radius, or the curve's."""
  if attack.attack == "curve":
    return True
  main = attacks(tests)[0]
  return attack != main and dataclasses.replace(attack, eps=main.eps) == main


def by_group(rows: Iterable[Row]) -> dict[Group, list[Row]]:
  """Rows by group, in the order in which groups first stand."""
  groups: dict[Group, list[Row]] = {}
  for row in rows:
    groups.setdefault(Group.of(row), []).append(row)
  return groups


def by_seed(rows: Iterable[Row], attack: Attacked) -> dict[int, float]:
  """The accuracy of each seed under an attack."""
  return {r["seed"]: r["value"] for r in rows if Attacked.of(r) == attack}


def corrupted(rows: Iterable[Row]) -> dict[int, float]:
  """The accuracy of each seed, the mean over corruptions and severities."""
  found: dict[int, list[float]] = {}
  for row in rows:
    if Attacked.of(row).is_corruption:
      found.setdefault(row["seed"], []).append(row["value"])
  return {seed: sum(of) / len(of) for seed, of in found.items()}


def is_member(group: Group) -> bool:
  """Whether it is one of an ensemble's frontier, `wise_ft-0.3`."""
  return "-" in group.stage


@dataclasses.dataclass(frozen=True)
class CurveOf:
  """Whose accuracy is known at several radii, and under what."""

  group: Group
  seed: int
  recipe: str
  norm: str

  @property
  def name(self) -> str:
    return (
      f"{self.group.name}, {self.group.weights}, seed {self.seed},"
      f" {self.recipe}"
    )


def curved(tests: Sequence[Row]) -> dict[CurveOf, dict[float, float]]:
  """Accuracy by radius, clean at 0, where there are two radii at least."""
  found: dict[CurveOf, dict[float, float]] = {}
  for group, own in by_group(tests).items():
    for row in own:
      attack = Attacked.of(row)
      if attack != CLEAN and not attack.is_corruption:
        of = CurveOf(group, row["seed"], attack.recipe, attack.norm or "")
        found.setdefault(of, {})[attack.eps or 0.0] = row["value"]
  found = {curve: of for curve, of in found.items() if len(of) > 1}
  for curve, points in found.items():
    clean = by_seed(by_group(tests)[curve.group], CLEAN)
    if curve.seed in clean:
      points[0.0] = clean[curve.seed]
  return found
