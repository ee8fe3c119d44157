"""Which tests a trained stage gets, and the rows that they leave."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging

from roli_jax import (
  corruptions,
  distributed,
  specs,
)
from roli_jax.evaluate import checks, diagnosis
from roli_jax.experiment import measure
from roli_jax.experiment.build import build_attack
from roli_jax.experiment.measure import Corruption, Test
from roli_jax.experiment.run import Run
from roli_jax.experiment.stages import Stage
from roli_jax.files import workdir
from roli_jax.results import record

# By the name that follows `corruptions:`.
CORRUPTIONS = {
  "standard": corruptions.STANDARD,
  "extra": corruptions.EXTRA,
  "glyphs": corruptions.GLYPHS,
  "guide": ("guide",),
}


def tests(run: Run, stage: Stage) -> Iterator[Test | Corruption]:
  """The tests of a stage, none if the config says so."""
  if run.config["test"]:
    yield Test(build_attack(run, "eval_attack"))
    for eps in run.config["curve"] if stage.curve else ():
      yield Test(build_attack(run, "eval_attack", eps))
    for name, norm, eps, count in stage.tests:
      if name.startswith("corruptions"):
        yield from _corruptions(name, eps, count)
      else:
        attack = build_attack(run, "eval_attack", eps, name=name, norm=norm)
        yield Test(attack, count)


def check(run: Run, stages: Iterable[Stage]) -> None:
  """Raises the ValueError that the tests of these stages would end in."""
  for stage in stages:
    for _ in tests(run, stage):
      pass


def _corruptions(name, severities, count):
  """Those of a set, at severities such as `1 3 5`, or at all."""
  chosen = name.partition(":")[2] or "standard"
  for each in specs.lookup(CORRUPTIONS, chosen, "set of corruptions"):
    for severity in severities.split() or range(1, 6):
      yield Corruption(each, int(severity), count)


def asked(run: Run) -> Iterator[Test | Corruption]:
  """The tests that --mode=evaluate is asked for."""
  config = run.config
  name = config["eval_attack"]["name"]
  if name.startswith("corruptions"):
    yield from _corruptions(name, "", config["num_images"])
    return
  radii = config["radii"] or (config["threat"]["eps"],)
  attack = build_attack(run, "eval_attack")
  if attack.is_ensemble and attack.finds_distance:
    radii = config["radii"] or (*config["curve"], config["threat"]["eps"])
    each = sorted({specs.number(eps) for eps in radii})
    yield Test(attack, config["num_images"], tuple(each))
    return
  for eps in radii:
    yield Test(build_attack(run, "eval_attack", eps), config["num_images"])


def rows(
  run: Run, stage: Stage, split: str, test: Test | Corruption
) -> list[dict[str, Any]]:
  """What the rows of a measurement are about."""
  about = {
    "cell": stage.cell,
    "stage": stage.name,
    "init": stage.init,
    "head_init": stage.head_init,
    "method": stage.method,
    "backbone": run.config["backbone"]["name"],
    "weights": stage.weights,
    "data": run.config["data"]["name"],
    "train_size": stage.train_size,
    "lr": stage.lr,
    "steps": stage.num_steps,
    "split": split,
    "metric": "accuracy",
    "seed": stage.seed,
  }
  return [{**about, **said} for said in test.about()]


def is_done(run: Run, stage: Stage, results: record.Record) -> bool:
  """Whether all rows of the stage stand."""
  wanted = rows(run, stage, "val", Test(build_attack(run, "val_attack")))
  for test in tests(run, stage):
    wanted += rows(run, stage, "test", test)
  return all(row in results for row in wanted)


def add_validation(
  run: Run, stage: Stage, results: record.Record, meta: Mapping[str, Any]
) -> None:
  """The rows of the best checkpoint's validation, as it was when selected.

  Args:
    run: the run.
    stage: that was trained.
    results: where rows go.
    meta: what the stage's last checkpoint says.
  """
  best = max(meta["history"], key=lambda entry: entry[stage.selected_by])
  about = rows(run, stage, "val", Test(build_attack(run, "val_attack")))
  values = [best["clean"], best["robust"]]
  _add(results, about, values, len(run.data["val"]), meta["seconds"])


def add_tests(
  run: Run,
  stage: Stage,
  results: record.Record,
  predict: Callable[..., Any],
  variables: Any,
  chosen: Iterable[Test | Corruption],
  split: str = "test",
) -> None:
  """The rows of these tests on the split, those that are missing.

  What an ensemble of attacks or a search did beyond a row goes to
  `evaluations/`, where it is also kept how far a killed one came.
  """
  for test in chosen:
    about = rows(run, stage, split, test)
    if all(row in results for row in about):
      continue
    folder = None
    if test.attack is not None and test.attack.is_long:
      folder = _folder(results.path.parent, stage, test)
    result = measure.run(
      run, predict, variables, stage.seed, split, test,
      folder and folder / "progress",
    )  # fmt: skip
    for check in result.checks:
      if check.verdict in ("warn", "fail"):
        logging.warning(
          "%s, %s: %s: %s: %s", stage.cell, about[-1]["attack"], check.verdict,
          check.name, check.said,
        )  # fmt: skip
    if test.attack is not None and not folder:
      _keep_checks(results.path.parent, stage, split, about[-1], result)
    if folder:
      attack: Any = test.attack
      found = _diagnosis(run, predict, variables, stage, test)
      eps = float(attack.threat.eps)
      _keep(folder, about[-1], eps, result, found, run.config["save_adv"])
    _add(results, about, test.values(result), len(result.clean),
         result.seconds)  # fmt: skip


def _folder(root, stage, test):
  threat = test.attack.threat
  name = f"{test.attack.name}-{threat.norm}-{float(threat.eps):g}"
  return root / "evaluations" / stage.directory / name


def _keep_checks(root, stage, split, about, result):
  """What there is to say of a test that leaves nothing else."""
  if not distributed.leads():
    return
  name = "-".join(
    f"{about[field]:g}" if field == "eps" else str(about[field])
    for field in ("attack", "attack_steps", "restarts", "norm", "eps")
  )
  folder = root / "evaluations" / stage.directory
  folder.mkdir(parents=True, exist_ok=True)
  workdir.write_json(
    folder / f"checks-{split}-{name}.json",
    {
      "row": about,
      "checks": {check.name: check.plain() for check in result.checks},
    },
  )


def _diagnosis(run, predict, variables, stage, test):
  """Checks that need attacks of their own, where they are asked for."""
  if not (test.attack.is_ensemble and run.diagnoses):
    return []
  source = run.data["test"]
  few = slice(0, checks.MOST)
  return diagnosis.run_on(
    measure.on_devices(run, source, predict, variables, stage.seed),
    source.pixels(few),
    source.labels[few],
    test.attack.threat,
    indices=source.indices[few],
  )


def _keep(folder, about, eps, result, found, with_images):
  """The summary of a result, its flags, and its images if asked for."""
  if not distributed.leads():
    return
  images = {"adv": result.adv} if with_images else {}
  np.savez_compressed(
    folder / "result.npz",
    clean=result.clean,
    robust=result.robust,
    broken_by=result.broken_by,
    distance=result.distance,
    min_distance=result.min_distance,
    margin=result.margin,
    **images,
  )
  summary = result.summary()
  summary["checks"] |= {check.name: check.plain() for check in found}
  summary |= {"row": about, "eps": eps}
  workdir.write_json(folder / "summary.json", summary)
  shutil.rmtree(folder / "progress")


def _add(results, about, values, n, seconds):
  for row, value in zip(about, values, strict=True):
    said = {"run": results.path.parent.name, "n": n, "seconds": seconds}
    results.add({**row, **said, "value": value})
