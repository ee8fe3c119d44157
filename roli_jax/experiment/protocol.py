"""How well a trained stage does, as rows of results."""

import functools
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from roli_jax import (
  attacks,
  corruptions,
  data,
  distributed,
  keys,
  sharding,
  specs,
  step,
  trees,
)
from roli_jax.evaluate import checks, diagnosis
from roli_jax.experiment import measure
from roli_jax.experiment.build import Parts, Variables
from roli_jax.experiment.measure import Corruption, Test
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


def examples(
  parts: Parts, stage: Stage, variables: Variables
) -> dict[str, Any]:
  """One test image of each class (ten at most), attacked, for a picture.

  Returns:
    Arrays: `images`, `adv` [n, h, w, c]; `labels`, `clean_said` and
    `adv_said` [n], the classes before and after; `eps` and `cell`.
  """
  model = parts.model(stage)
  attack = parts.attack("eval_attack")
  source = parts.data["test"]
  _, firsts = np.unique(source.labels, return_index=True)
  few = source.take(firsts[:10])
  logits_fn = functools.partial(step.make_predict(model), variables)
  key = keys.stream(keys.root(stage.seed), attack.name)

  @jax.jit
  def look(images, labels, indices):
    image_keys = keys.per_image(key, indices)
    adv = attack(logits_fn, images, labels, image_keys)
    said = [logits_fn(x).argmax(-1) for x in (images, adv)]
    return adv, *said

  found = look(few.pixels(), few.labels, few.indices)
  adv, clean_said, adv_said = sharding.fetch(found)
  return {
    "cell": stage.cell,
    "eps": attack.threat.eps,
    "images": few.pixels(),
    "labels": few.labels,
    "adv": adv,
    "clean_said": clean_said,
    "adv_said": adv_said,
  }


def tests(parts: Parts, stage: Stage) -> Iterator[Test | Corruption]:
  """The tests of a stage, none if the config says so."""
  if parts.config["test"]:
    yield Test(parts.attack("eval_attack"))
    for eps in parts.config["curve"] if stage.curve else ():
      yield Test(parts.attack("eval_attack", eps))
    for name, norm, eps, count in stage.tests:
      if name.startswith("corruptions"):
        yield from _corruptions(name, eps, count)
      else:
        attack = parts.attack("eval_attack", eps, name=name, norm=norm)
        yield Test(attack, count)


def check(parts: Parts, stages: Iterable[Stage]) -> None:
  """Raises the ValueError that the tests of these stages would end in."""
  for stage in stages:
    for _ in tests(parts, stage):
      pass


def _corruptions(name, severities, count):
  """Those of a set, at severities such as `1 3 5`, or at all."""
  chosen = name.partition(":")[2] or "standard"
  for each in specs.choose(CORRUPTIONS, chosen, "set of corruptions"):
    for severity in severities.split() or range(1, 6):
      yield Corruption(each, int(severity), count)


def asked(parts: Parts) -> Iterator[Test | Corruption]:
  """The tests that --mode=evaluate is asked for."""
  config = parts.config
  name = config["eval_attack"]["name"]
  if name.startswith("corruptions"):
    yield from _corruptions(name, "", config["num_images"])
    return
  radii = config["radii"] or (config["threat"]["eps"],)
  attack = parts.attack("eval_attack")
  if isinstance(attack, attacks.Curve):
    radii = config["radii"] or (*config["curve"], config["threat"]["eps"])
    each = sorted({specs.number(eps) for eps in radii})
    yield Test(attack, config["num_images"], tuple(each))
    return
  for eps in radii:
    yield Test(parts.attack("eval_attack", eps), config["num_images"])


def rows(
  parts: Parts, stage: Stage, split: str, test: Test | Corruption
) -> list[dict[str, Any]]:
  """What the rows of a measurement are about."""
  about = {
    "cell": stage.cell,
    "stage": stage.name,
    "init": stage.init,
    "head_init": stage.head_init,
    "method": stage.method,
    "backbone": parts.config["backbone"]["name"],
    "weights": stage.weights,
    "data": parts.config["data"]["name"],
    "train_size": stage.train_size,
    "lr": stage.lr,
    "steps": stage.num_steps,
    "split": split,
    "metric": "accuracy",
    "seed": stage.seed,
  }
  return [{**about, **said} for said in test.about()]


def is_done(parts: Parts, stage: Stage, results: record.Record) -> bool:
  """Whether all rows of the stage stand."""
  wanted = rows(parts, stage, "val", Test(parts.attack("val_attack")))
  for test in tests(parts, stage):
    wanted += rows(parts, stage, "test", test)
  return all(row in results for row in wanted)


def add_validation(
  parts: Parts, stage: Stage, results: record.Record, meta: Mapping[str, Any]
) -> None:
  """The rows of the best checkpoint's validation, as it was when selected.

  Args:
    parts: of the run.
    stage: that was trained.
    results: where rows go.
    meta: of the stage's last checkpoint.
  """
  best = max(meta["history"], key=lambda entry: entry[selected_by(stage)])
  about = rows(parts, stage, "val", Test(parts.attack("val_attack")))
  values = [best["clean"], best["robust"]]
  _add(results, about, values, len(parts.data["val"]), meta["seconds"])


def add_tests(
  parts: Parts,
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
    about = rows(parts, stage, split, test)
    if all(row in results for row in about):
      continue
    folder = None
    if not isinstance(test.attack, attacks.Pgd | attacks.Fgsm | None):
      folder = _folder(results.path.parent, stage, test)
    result = measure.run(
      parts, predict, variables, stage.seed, split, test,
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
      found = _diagnosis(parts, predict, variables, stage, test)
      eps = float(attack.threat.eps)
      _keep(folder, about[-1], eps, result, found, parts.config["save_adv"])
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


def _diagnosis(parts, predict, variables, stage, test):
  """Checks that need attacks of their own, where they are asked for."""
  ensemble = isinstance(test.attack, attacks.AutoAttack | attacks.Curve)
  if not (ensemble and parts.diagnoses):
    return []
  source = parts.data["test"]
  few = slice(0, checks.MOST)
  return diagnosis.run_on(
    measure.on_devices(parts, predict, variables, stage.seed),
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


def write_facts(
  parts: Parts, stages: Iterable[Stage], path: pathlib.Path
) -> None:
  """What a report says of methods and data, to `facts.json`."""
  sizes = {}
  for stage in {stage.method: stage for stage in stages}.values():
    params = jax.eval_shape(parts.model(stage).init, keys.root(0))[0]
    trained, _ = parts.method(stage).split(params)
    sizes[stage.method] = (trees.size(trained), trees.size(params))
  splits = {split: parts.data[split] for split in data.SPLITS}
  facts = {
    "backbone": parts.config["backbone"]["name"],
    "in_files": parts.config["data"]["name"] in data.IN_FILES,
    "parameters": sizes,
    "skipped": {split: source.skipped for split, source in splits.items()},
    # What is said of the whole set is said once.
    "notes": list(dict.fromkeys(n for s in splits.values() for n in s.notes)),
    "manifest": [line for s in splits.values() for line in s.manifest()],
  }
  workdir.write_json(path / "facts.json", facts)


def selected_by(stage: Stage) -> str:
  """The validation accuracy that selects a stage's best checkpoint.

  Adversarial, as in the RoLI reference; clean where training is.
  """
  return "clean" if stage.loss == "clean" else "robust"
