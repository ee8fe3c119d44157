"""How well a trained stage does, as rows of results."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from roli_jax import (
  attacks,
  data,
  evaluate,
  keys,
  models,
  record,
  step,
)
from roli_jax.parts import Parts, Variables
from roli_jax.table import Stage

CLEAN: dict[str, Any] = {"attack": "none"}


def measure(
  parts: Parts,
  model: models.Model,
  variables: Variables,
  seed: int,
  split: str,
  attack: attacks.Attack,
) -> evaluate.Result:
  """One attack on one split of the run's data."""
  source: data.Source = parts.data[split]
  return evaluate.run(
    step.make_predict(model),
    source.pixels(),
    source.labels,
    attack,
    params=variables,
    seed=seed,
    batch_size=parts.config["eval_batch_size"],
    indices=source.indices,
  )


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

  adv, clean_said, adv_said = look(few.pixels(), few.labels, few.indices)
  return {
    "cell": stage.cell,
    "eps": attack.threat.eps,
    "images": few.pixels(),
    "labels": few.labels,
    "adv": np.asarray(adv),
    "clean_said": np.asarray(clean_said),
    "adv_said": np.asarray(adv_said),
  }


def tests(parts: Parts, stage: Stage) -> Iterator[attacks.Attack]:
  """The attacks that a stage is tested with, none if the config says so."""
  if parts.config["test"]:
    yield parts.attack("eval_attack")
    for eps in parts.config["curve"] if stage.curve else ():
      yield parts.attack("eval_attack", eps)


def rows(
  parts: Parts, stage: Stage, split: str, attack: attacks.Attack
) -> tuple[dict[str, Any], dict[str, Any]]:
  """What the clean and the adversarial row of a measurement are about."""
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
  attacked = {
    "attack": attack.name,
    "attack_steps": attack.num_steps,
    "restarts": attack.num_restarts,
    "norm": attack.threat.norm,
    "eps": float(attack.threat.eps),
  }
  return {**about, **CLEAN}, {**about, **attacked}


def is_done(parts: Parts, stage: Stage, results: record.Record) -> bool:
  """Whether all rows of the stage stand."""
  wanted = list(rows(parts, stage, "val", parts.attack("val_attack")))
  for attack in tests(parts, stage):
    wanted += rows(parts, stage, "test", attack)
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
  about = rows(parts, stage, "val", parts.attack("val_attack"))
  values = (best["clean"], best["robust"])
  _add(results, about, values, len(parts.data["val"]), meta["seconds"])


def add_tests(
  parts: Parts,
  stage: Stage,
  results: record.Record,
  model: models.Model,
  variables: Variables,
  chosen: Iterable[attacks.Attack],
) -> None:
  """The rows of these attacks on the test split, those that are missing."""
  for attack in chosen:
    about = rows(parts, stage, "test", attack)
    if all(row in results for row in about):
      continue
    result = measure(parts, model, variables, stage.seed, "test", attack)
    values = (float(result.clean.mean()), float(result.robust.mean()))
    _add(results, about, values, len(result.clean), result.seconds)


def _add(results, about, values, n, seconds):
  for row, value in zip(about, values, strict=True):
    said = {"run": results.path.parent.name, "n": n, "seconds": seconds}
    results.add({**row, **said, "value": value})


def selected_by(stage: Stage) -> str:
  """The validation accuracy that selects a stage's best checkpoint.

  Adversarial, as in the RoLI reference; clean where training is.
  """
  return "clean" if stage.loss == "clean" else "robust"
