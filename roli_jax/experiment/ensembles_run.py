"""The probe and what was fine-tuned from it, as one classifier.

Ensembles are evaluated as models are: an attack goes through the whole of one,
and a fresh pass of the whole judges it. What an ensemble has to choose, alpha
or VRF's a and b, is chosen on validation, by robust accuracy. Its rows say
which it is in place of the stage: `wise_ft-0.3` for one alpha of the frontier,
`wise_ft` for the chosen one.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from roli_jax import data, ensembles, sharding, specs, step
from roli_jax.experiment import measure, protocol
from roli_jax.experiment.build import (
  build_attack,
  build_model,
  build_predict,
  build_program,
)
from roli_jax.experiment.run import Run, training_images
from roli_jax.experiment.stages import Stage
from roli_jax.results import record
from roli_jax.types import Variables

ALPHAS = tuple(i / 10 for i in range(11))
# Tested by the main attack alone: it is there to be drawn beside the others,
# and each attack on it costs two models' passes.
MAIN_ALONE = ("output",)
# Of squared distances, which lie in [0, 4].
A = (0.1, 0.3, 0.6, 1.0, 1.5)
B = (0.1, 0.3, 0.6)


@dataclasses.dataclass(frozen=True)
class Family:
  """Ensembles that differ in what is chosen on validation.

  Attributes:
    predict: `(variables, images) -> log probabilities`.
    members: variables by what is chosen, as rows say it.
    is_frontier: whether the test set is told of all of them.
  """

  predict: Callable[..., Any]
  members: dict[str, Any]
  is_frontier: bool


def check(run: Run, stages: Iterable[Stage]) -> None:
  """Raises the ValueError that the config's ensembles would end in."""
  names = run.config.get("ensembles", ())
  for name in names:
    specs.lookup(FAMILIES, name, "ensemble")
  for stage in stages:
    adds = stage.start and jax.tree.leaves(
      build_program(run, stage).abstract_state.params.peft
    )
    if "wise_ft" in names and adds:
      raise ValueError(
        f"wise_ft mixes the weights of a probe and of {stage.cell}, and"
        f" {stage.method} has weights that the probe hasn't; take output or vrf"
      )


def run(
  run: Run,
  stage: Stage,
  results: record.Record,
  first: Variables,
  second: Variables,
) -> None:
  """The rows of the config's ensembles, those that are missing.

  Args:
    run: the run.
    stage: that was fine-tuned from another.
    results: where rows go.
    first: the best of the stage that it started from.
    second: the best of this one.
  """
  for name in run.config["ensembles"]:
    make = FAMILIES[name]
    chosen = dataclasses.replace(stage, name=name)
    tests = list(protocol.tests(run, chosen))
    if name in MAIN_ALONE:
      tests = tests[:1]
    wanted = [r for t in tests for r in protocol.rows(run, chosen, "test", t)]
    if tests and all(row in results for row in wanted):
      continue
    family = make(run, stage, first, second)
    best = _best(run, chosen, results, family)
    if family.is_frontier and run.config["test"]:
      for label, variables in family.members.items():
        member = dataclasses.replace(stage, name=f"{name}-{label}")
        test = measure.Test(build_attack(run, "eval_attack"))
        protocol.add_tests(
          run, member, results, family.predict, variables, [test]
        )
    protocol.add_tests(run, chosen, results, family.predict, best, tests)


def _best(run, chosen, results, family):
  """The member of the highest robust accuracy on validation."""
  test = measure.Test(build_attack(run, "val_attack"))
  robust = {}
  for label, variables in family.members.items():
    member = dataclasses.replace(chosen, name=f"{chosen.name}-{label}")
    protocol.add_tests(
      run, member, results, family.predict, variables, [test], "val"
    )
    *_, about = protocol.rows(run, member, "val", test)
    (row,) = record.where(results.rows, **about)
    robust[label] = row["value"]
  return family.members[max(robust, key=lambda label: robust[label])]


def _wise_ft(run, stage, first, second):
  return Family(
    build_predict(run, stage),
    {f"{a:g}": ensembles.wse(first, second, a) for a in ALPHAS},
    is_frontier=True,
  )


def _output(run, stage, first, second):
  predicts = (build_predict(run, s) for s in (stage.start, stage))
  return Family(
    ensembles.output_space(*predicts),
    {f"{a:g}": (first, second, np.float32(a)) for a in ALPHAS},
    is_frontier=True,
  )


def _vrf(run, stage, first, second):
  """The bank from the stage's training images, k = 1.

  The authors' rule for k counts members per thousand images, which is beyond
  the bank for a few hundred; the paper's, 0.1% of the bank, is one. A bank
  without members, where the probe errs on nothing that fine-tuning mends, gives
  both models the same weight.
  """
  probe = build_predict(run, stage.start)
  both = step.make_both(build_model(run, stage))
  train, held = training_images(run, stage), run.data["val"]

  def outputs(fn, variables, source):
    return _in_batches(jax.jit(functools.partial(fn, variables)), source)

  zs_logits, zs_held = (outputs(probe, first, of) for of in (train, held))
  (feats, ft_logits), (_, ft_held) = (
    outputs(both, second, of) for of in (train, held)
  )
  state = ensembles.vrf_fit(
    zs_logits, ft_logits, train.labels, feats, rule="paper", zs_held=zs_held,
    ft_held=ft_held, held_labels=held.labels, alpha=0.5,
  )  # fmt: skip
  members = {
    f"{a:g}-{b:g}": dataclasses.replace(state, a=np.float32(a), b=np.float32(b))
    for a in A
    for b in B
  }
  return Family(
    ensembles.vrf(probe, both),
    {label: (first, second, of) for label, of in members.items()},
    is_frontier=False,
  )


def _in_batches(fn, source: data.Source, size: int = 256) -> Any:
  """What a function says of all of a split's images."""
  rows = np.arange(len(source))
  said = [
    sharding.fetch(fn(source.pixels(rows[start : start + size])))
    for start in range(0, len(rows), size)
  ]
  return jax.tree.map(lambda *x: np.concatenate(x), *said)


FAMILIES = {"wise_ft": _wise_ft, "output": _output, "vrf": _vrf}
