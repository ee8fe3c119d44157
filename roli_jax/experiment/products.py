"""What a finished run leaves beside rows: examples, pretrained weights."""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import attacks, convert, distributed, keys, sharding
from roli_jax.experiment.build import build_attack, build_model
from roli_jax.experiment.program import build_predict
from roli_jax.experiment.run import Run
from roli_jax.experiment.stages import Stage
from roli_jax.experiment.start_and_resume import Best
from roli_jax.types import (
  Array,
  Images,
  Integer,
  Key,
  Labels,
  Logits,
  Variables,
)


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
  search = attacked(logits_fn, attack, key)
  found = search(few.pixels(), few.labels, few.indices)
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


def attacked(
  logits_fn: Callable[[Images], Logits],
  attack: attacks.Attack,
  key: Key[Array, ""],
) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
  """Returns a jitted attack of few images, for pictures.

  Args:
    logits_fn: images in, logits out.
    attack: a single attack, no ensemble.
    key: the root of the images' keys.

  Returns:
    From images, labels and who they are: the adversarial images, and the
    classes that the function says before and after.
  """

  @jax.jit
  def search(
    images: Images, labels: Labels, indices: Integer[jax.Array, " b"]
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    image_keys = keys.per_image(key, indices)
    adv = jnp.asarray(attack(logits_fn, images, labels, image_keys))
    return adv, logits_fn(images).argmax(-1), logits_fn(adv).argmax(-1)

  return search
