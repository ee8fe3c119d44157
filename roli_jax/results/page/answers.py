"""What a report is opened for: how accurate is each model, best first."""

import dataclasses
from collections.abc import Sequence

from roli_jax import statistics
from roli_jax.results import comparison, record
from roli_jax.results.grouping import (
  CLEAN,
  Attacked,
  Group,
  attacks,
  by_seed,
  collect,
)
from roli_jax.results.record import Row


@dataclasses.dataclass(frozen=True)
class Estimate:
  """An accuracy with its interval of 95%, all in [0, 1].

  Attributes:
    value: the accuracy, the mean over seeds.
    low: Student's interval over seeds; of one seed Wilson's over images.
    high: the other end of it.
  """

  value: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Answer:
  """How accurate a model is, clean and under attack; None: not measured.

  Attributes:
    name: the model's, as tables have it.
    of: what the intervals are over: `3 seeds`, `500 images`.
    clean: the accuracy on clean images.
    robust: that under the attack which most models have seen.
    attack: that attack; None where there is none.
    group: what the model's rows have in common.
    runs: the names of its runs in rows; "" where there is one run.
  """

  name: str
  of: str
  clean: Estimate | None
  robust: Estimate | None
  attack: Attacked | None
  group: Group
  runs: frozenset[str]


def estimate(rows: Sequence[Row], kind: Attacked) -> Estimate | None:
  """Returns the accuracy under an attack, None where it was not measured."""
  values = list(by_seed(rows, kind).values())
  if not values:
    return None
  if len(values) > 1:
    mean, low, high = statistics.t_interval(values)
    return Estimate(mean, max(low, 0.0), min(high, 1.0))
  (n,) = {row["n"] for row in rows if Attacked.of(row) == kind}
  low, high = statistics.wilson(round(values[0] * n), n)
  return Estimate(values[0], low, high)


def answers(rows: Sequence[Row]) -> list[Answer]:
  """Returns the accuracies of all models, the most robust first."""
  tests = named(record.where(rows, split="test"))
  main = next(iter(attacks(tests)), None)
  found = []
  for name, (group, own) in comparison.by_name(tests).items():
    seeds = len({row["seed"] for row in own})
    answer = Answer(
      name,
      f"{seeds} seeds" if seeds > 1 else f"{max(r['n'] for r in own)} images",
      estimate(own, CLEAN),
      estimate(own, main) if main else None,
      main,
      group,
      frozenset(row["run"] for row in own),
    )
    found.append(answer)
  return sorted(found, key=_order)


def named(rows: Sequence[Row]) -> list[Row]:
  """Returns rows of one run without its name, which would stand before all."""
  if len(collect(rows, lambda row: row["run"])) > 1:
    return list(rows)
  return [{**row, "run": ""} for row in rows]


def _order(answer: Answer) -> tuple[float, float]:
  robust, clean = (
    -found.value if found else 1.0 for found in (answer.robust, answer.clean)
  )
  return robust, clean
