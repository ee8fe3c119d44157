"""What a finished run leaves beside rows: examples, pretrained weights."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from roli_jax import convert, distributed, evaluate
from roli_jax.experiment import evaluation_files, measure
from roli_jax.experiment.build import build_attack, build_model
from roli_jax.experiment.program import build_predict
from roli_jax.experiment.run import Run
from roli_jax.experiment.stages import Stage
from roli_jax.experiment.start_and_resume import Best
from roli_jax.types import Variables


def keep(
  run: Run,
  stages: Sequence[Stage],
  path: pathlib.Path,
  best: Best,
) -> None:
  """Writes pretrained weights, and examples for a picture, where they lack.

  Args:
    run: the run, which has finished.
    stages: all its stages.
    path: the run's directory.
    best: returns the variables of a stage's best checkpoint.
  """
  for stage in [s for s in stages if s.name == "pretrain"]:
    model = build_model(run, stage)
    file = path / f"{model.name}_{stage.weights}.safetensors"
    if not file.exists():
      # Other configs name it as their weights.
      classes = tuple(run.data["test"].classes)
      bundle = convert.Bundle(model, *best(stage), classes=classes)
      if distributed.leads():
        convert.save(bundle, file)
  if run.config["test"]:
    _keep_examples(run, stages, path, best)


def _keep_examples(
  run: Run, stages: Sequence[Stage], path: pathlib.Path, best: Best
) -> None:
  """Writes examples of the last stage that has a curve, or of the last one."""
  file = path / "figures" / "examples.npz"
  is_there = file.exists()
  distributed.wait("examples")  # all processes have looked: one may write
  if is_there:
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
  """Attacks one test image of each class (ten at most), for a picture.

  As its test does, by the same programs and with the same draws.

  Returns:
    Arrays: `images`, `adv` [n, h, w, c]; `labels`, `clean_said` and
    `adv_said` [n], the classes before and after; `eps` and `cell`.
  """
  attack = build_attack(run, "eval_attack")
  source = run.data["test"]
  _, firsts = np.unique(source.labels, return_index=True)
  rows = firsts[:10]
  images = source.pixels(rows)
  predict = build_predict(run, stage)
  function = measure.on_devices(
    run, source, predict, variables, stage.seed, run.compute_dtype
  )
  result = evaluate.run_on(
    function,
    images,
    source.labels[rows],
    attack,
    indices=source.indices[rows],
    checked=False,
  )
  adv, *_ = evaluation_files.attacked(result, images)
  clean_said, adv_said = (
    evaluation_files.predicted(function, source, rows, seen)[0]
    for seen in (images, adv)
  )
  return {
    "cell": stage.cell,
    "eps": attack.threat.eps,
    "images": images,
    "labels": source.labels[rows],
    "adv": adv,
    "clean_said": clean_said,
    "adv_said": adv_said,
  }
