"""Which tests a stage gets, in training and after it, and their rows."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from roli_jax import attacks, corruptions, specs
from roli_jax.evaluate import checks, diagnosis
from roli_jax.experiment import evaluation_files, measure
from roli_jax.experiment.build import build_attack
from roli_jax.experiment.measure import Corruption, Test
from roli_jax.experiment.program import build_predict, check_run
from roli_jax.experiment.run import Run
from roli_jax.experiment.stages import Stage
from roli_jax.results import record

# By the name that follows `corruptions:`.
CORRUPTIONS = {
  "standard": corruptions.STANDARD,
  "extra": corruptions.EXTRA,
  "glyphs": corruptions.GLYPHS,
  "guide": ("guide",),
}


def tests(run: Run, stage: Stage) -> Iterator[Test | Corruption]:
  """Yields the tests of a trained stage, none if the config wants none."""
  if run.config["test"]:
    few = run.config["num_images"]
    yield Test(build_attack(run, "eval_attack"), few)
    for eps in run.config["curve"] if stage.curve else ():
      yield Test(build_attack(run, "eval_attack", eps), few)
    for name, norm, eps, count in stage.tests:
      count = count or few
      if name.startswith("corruptions"):
        yield from _corruptions(name, eps, count)
      else:
        attack = build_attack(run, "eval_attack", eps, name=name, norm=norm)
        yield Test(attack, count)


def check(run: Run, stages: Sequence[Stage]) -> None:
  """Raises the ValueError that training and testing these would end in."""
  check_run(run, stages)
  for stage in stages:
    list(tests(run, stage))


def _corruptions(
  name: str, severities: str, count: int
) -> Iterator[Corruption]:
  """Yields the corruptions of a set.

  Args:
    name: `corruptions`, or with a key of `CORRUPTIONS`, `corruptions:extra`.
    severities: such as `1 3 5`, from 1 to 5; "": all five.
    count: how many images of the split; 0: all.
  """
  chosen = name.partition(":")[2] or "standard"
  for corruption in specs.lookup(CORRUPTIONS, chosen, "set of corruptions"):
    for severity in severities.split() or range(1, 6):
      yield Corruption(corruption, int(severity), count)


def evaluation_tests(run: Run) -> Iterator[Test | Corruption]:
  """Yields the tests of --mode=evaluate."""
  config = run.config
  name = config["eval_attack"]["name"]
  if name.startswith("corruptions"):
    yield from _corruptions(name, "", config["num_images"])
    return
  radii = config["radii"] or (config["threat"]["eps"],)
  attack = build_attack(run, "eval_attack")
  if attack.is_ensemble and attack.finds_distance:
    radii = config["radii"] or (*config["curve"], config["threat"]["eps"])
    increasing = sorted({specs.number(eps) for eps in radii})
    yield Test(attack, config["num_images"], tuple(increasing))
    return
  for eps in radii:
    yield Test(build_attack(run, "eval_attack", eps), config["num_images"])


def rows(
  run: Run, stage: Stage, split: str, test: Test | Corruption
) -> list[dict[str, Any]]:
  """Returns the rows of a measurement, without what was measured."""
  about = {
    **stage.row,
    # None where nobody trains.
    "init": stage.init or None,
    "head_init": stage.head_init or None,
    "method": stage.method or None,
    "backbone": run.config["backbone"]["name"],
    "weights": stage.weights,
    "data": run.config["data"]["name"],
    "train_size": stage.train_size or None,
    "split": split,
    "metric": "accuracy",
    "seed": stage.seed,
  }
  return [{**about, **attacked} for attacked in test.about()]


def is_done(run: Run, stage: Stage, results: record.Record) -> bool:
  """Whether the file of results has all rows of the stage."""
  wanted = rows(run, stage, "val", _validation(run))
  for test in tests(run, stage):
    wanted += rows(run, stage, "test", test)
  return all(row in results for row in wanted)


def _validation(run: Run) -> Test:
  return Test(build_attack(run, "val_attack"), run.config["num_val_images"])


def validate(
  run: Run, stage: Stage, variables: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Measures clean and robust accuracy on the validation split.

  Args:
    run: the run.
    stage: the stage in training.
    variables: its parameters and running statistics now.

  Returns:
    The fields `attack`, `value` and `n` of the log's rows: clean, attacked.
  """
  test, predict = _validation(run), build_predict(run, stage)
  result = measure.run(
    run, predict, variables, stage.seed, "val", test, checked=False
  )
  clean, robust = test.values(result)
  n = len(result.clean)
  return (
    {"attack": "none", "value": clean, "n": n},
    {"attack": test.attack.name, "value": robust, "n": n},
  )


def add_validation(
  run: Run, stage: Stage, results: record.Record, meta: Mapping[str, Any]
) -> None:
  """Adds the rows of the best checkpoint's validation, as when selected.

  Args:
    run: the run.
    stage: the stage that was trained.
    results: where rows go.
    meta: the meta data of the stage's last checkpoint.
  """
  best = max(meta["history"], key=lambda entry: entry[stage.selected_by])
  test = _validation(run)
  about = rows(run, stage, "val", test)
  values = [best["clean"], best["robust"]]
  n = len(run.data["val"].some(test.num_images))
  _add(results, about, values, n, meta["seconds"])


def test_stage(
  run: Run, stage: Stage, results: record.Record, variables: Any
) -> None:
  """Runs the tests of a trained stage whose rows are missing.

  Args:
    run: the run.
    stage: the stage.
    results: where rows go.
    variables: the parameters and running statistics of its best checkpoint.
  """
  predict = build_predict(run, stage)
  add_tests(run, stage, results, predict, variables, tests(run, stage))


def add_tests(
  run: Run,
  stage: Stage,
  results: record.Record,
  predict: Callable[..., Any],
  variables: Any,
  chosen: Iterable[Test | Corruption],
  split: str = "test",
) -> None:
  """Runs the tests whose rows are missing, and adds those.

  A row of fewer images than the test has is missing; one of more stays.

  What a long attack (an ensemble, a search) finds beyond a row is written to
  `evaluations/`, as is its progress, from which a killed run goes on. So are
  a few images of first seeds.

  Args:
    run: the run.
    stage: the stage that was trained.
    results: where rows go.
    predict: `(variables, images) -> logits`.
    variables: what `predict` takes first.
    chosen: the tests.
    split: `train`, `val` or `test`.
  """
  evaluations = results.path.parent / "evaluations"
  root = evaluations / stage.directory
  save_adv = run.config["save_adv"]
  for test in chosen:
    about = rows(run, stage, split, test)
    n = len(run.data[split].some(test.num_images))
    if all({**row, "n": n} in results for row in about):
      continue
    attack = test.attack
    folder = None
    if attack is not None and attack.is_long:
      eps = float(attack.threat.eps)
      folder = root / f"{attack.name}-{attack.threat.norm}-{eps:g}"
    progress = folder and folder / "progress"
    result = measure.run(
      run, predict, variables, stage.seed, split, test, progress, save_adv
    )
    for check in result.checks:
      if check.verdict in ("warn", "fail"):
        where = f"{stage.cell}, {about[-1]['attack']}: {check.verdict}"
        logging.warning("%s: %s: %s", where, check.name, check.said)
    if attack is not None and folder:
      found = _diagnosis(run, predict, variables, stage, attack)
      summary = {"row": about[-1], "eps": float(attack.threat.eps)}
      evaluation_files.keep(folder, summary, result, found, save_adv)
    elif attack is not None:
      evaluation_files.keep_checks(root, split, about[-1], result)
    if isinstance(test, Test) and _keeps_images(run, stage):
      source = run.data[split]
      evaluation_files.keep_images(
        evaluations,
        stage.directory,
        about,
        test.radii,
        source,
        source.some(test.num_images),
        result,
        measure.on_devices(run, source, predict, variables, stage.seed),
      )
    _add(results, about, test.values(result), len(result.clean), result.seconds)


def _keeps_images(run: Run, stage: Stage) -> bool:
  """Whether the report shows images of it: of first seeds, of no frontier."""
  return stage.seed == run.config["seed"] and "-" not in stage.name


def _diagnosis(
  run: Run,
  predict: Callable[..., Any],
  variables: Any,
  stage: Stage,
  attack: attacks.Attack,
) -> list[checks.Check]:
  """Runs checks that need attacks of their own, if the run asks for them."""
  if not (attack.is_ensemble and run.diagnoses):
    return []
  source = run.data["test"]
  few = slice(0, checks.MOST)
  return diagnosis.run_on(
    measure.on_devices(run, source, predict, variables, stage.seed),
    source.pixels(few),
    source.labels[few],
    attack.threat,
    indices=source.indices[few],
  )


def _add(
  results: record.Record,
  about: Iterable[Mapping[str, Any]],
  values: Iterable[float],
  n: int,
  seconds: float,
) -> None:
  """Adds rows with their values, measured on n images in so many seconds."""
  measured = {"run": results.path.parent.name, "n": n, "seconds": seconds}
  for row, value in zip(about, values, strict=True):
    results.add({**row, **measured, "value": value})
