"""What a run leaves beside rows: facts, examples, weights of a pretraining."""

import functools
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from roli_jax import convert, data, distributed, keys, sharding, trees
from roli_jax.experiment.build import (
  build_attack,
  build_method,
  build_model,
  build_predict,
)
from roli_jax.experiment.run import Run
from roli_jax.experiment.stages import Stage
from roli_jax.files import workdir
from roli_jax.results import report, tables
from roli_jax.types import Variables


def write_facts(run: Run, stages: Iterable[Stage], path: pathlib.Path) -> None:
  """Writes what a report tells of methods and data to `facts.json`.

  Of images in files it is also printed.
  """
  sizes = {}
  for stage in {stage.method: stage for stage in stages}.values():
    params = jax.eval_shape(build_model(run, stage).init, keys.root(0))[0]
    trained, _ = build_method(run, stage).split(params)
    sizes[stage.method] = (trees.size(trained), trees.size(params))
  splits = {split: run.data[split] for split in data.SPLITS}
  facts = {
    "backbone": run.config["backbone"]["name"],
    "in_files": run.config["data"]["name"] in data.IN_FILES,
    "parameters": sizes,
    "skipped": {split: source.skipped for split, source in splits.items()},
    # What is said of the whole set is said once.
    "notes": list(dict.fromkeys(n for s in splits.values() for n in s.notes)),
    "manifest": [line for s in splits.values() for line in s.manifest()],
  }
  workdir.write_json(path / "facts.json", facts)
  if facts["in_files"]:
    tables.show(report.facts(path))


def keep(
  run: Run,
  stages: Sequence[Stage],
  path: pathlib.Path,
  best: Callable[[Stage], Variables],
) -> None:
  """Writes pretrained weights, and examples for a picture, where they lack.

  Args:
    run: the run, which has finished.
    stages: all its stages.
    path: the run's directory.
    best: returns the variables of a stage's best checkpoint.
  """
  for stage in stages:
    if stage.name == "pretrain":
      _keep_weights(run, stage, path, best)
  if run.config["test"]:
    _keep_examples(run, stages, path, best)


def _keep_weights(run, stage, path, best):
  """What was pretrained, as a bundle that other configs can name."""
  model = build_model(run, stage)
  file = path / f"{model.name}_{stage.weights}.safetensors"
  if not file.exists():
    bundle = convert.Bundle(model, *best(stage))
    if distributed.leads():
      convert.save(bundle, file)


def _keep_examples(run, stages, path, best):
  """Examples of the last stage whose curve is drawn, or of the last one."""
  file = path / "figures" / "examples.npz"
  there = file.exists()
  distributed.wait("examples")  # before it is written
  if there:
    return
  stage = ([s for s in stages if s.curve] or stages)[-1]
  file.parent.mkdir(parents=True, exist_ok=True)
  examples = _examples(run, stage, best(stage))
  if not distributed.leads():
    return
  partial = file.with_name("examples.partial.npz")
  np.savez(partial, **examples)
  partial.replace(file)


def _examples(run: Run, stage: Stage, variables: Variables) -> dict[str, Any]:
  """One test image of each class (ten at most), attacked, for a picture.

  Returns:
    Arrays: `images`, `adv` [n, h, w, c]; `labels`, `clean_said` and
    `adv_said` [n], the classes before and after; `eps` and `cell`.
  """
  attack = build_attack(run, "eval_attack")
  source = run.data["test"]
  _, firsts = np.unique(source.labels, return_index=True)
  few = source.take(firsts[:10])
  logits_fn = functools.partial(build_predict(run, stage), variables)
  key = keys.stream(keys.root(stage.seed), attack.name)

  @jax.jit
  def look(images, labels, indices):
    image_keys = keys.per_image(key, indices)
    adv = attack(logits_fn, images, labels, image_keys)
    classes = [logits_fn(x).argmax(-1) for x in (images, adv)]
    return adv, *classes

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
