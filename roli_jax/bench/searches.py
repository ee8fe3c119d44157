"""AutoAttack's parts against the bare passes through the model."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from roli_jax import attacks, data, evaluate, keys, models, step
from roli_jax.bench import passes, workload
from roli_jax.bench.timing import Row, row
from roli_jax.threat import ThreatModel
from roli_jax.types import Variables


def searches(config: Mapping[str, Any]) -> Iterator[Row]:
  """AutoAttack's parts against the bare passes through the model.

  On the shipped network all of AutoAttack, each attack alone on all images;
  on a random ViT-S/16 at 224 a few steps, for the rate of passes.
  """
  model, variables = workload.shipped()
  letters = data.build("letters", "val").take(
    np.arange(config["attack_images"])
  )
  images, labels = letters.pixels(), letters.labels
  parts = attacks.AutoAttack(ThreatModel("linf", 0.1)).parts
  yield from _searched("8x8", model, variables, images, labels, parts)
  if config["attack_images_224"]:
    yield from at_224(config)


def at_224(config: Mapping[str, Any]) -> Iterator[Row]:
  """A few steps of each part on a random ViT-S/16, for the rate of passes."""
  model = models.create("vit_s16", 1000)
  shape = (config["attack_images_224"], 224, 224, 3)
  images = np.random.default_rng(0).uniform(size=shape).astype(np.float32)
  variables = model.init(keys.root(0))
  labels = np.asarray(step.make_predict(model)(variables, images).argmax(-1))
  few = ThreatModel("linf", 1e-6)  # nothing breaks: all steps are taken
  few_steps = (
    attacks.build("apgd_ce", few, num_steps=9),
    attacks.build("apgd_t", few, num_steps=9, num_targets=1),
    attacks.build("fab_t", few, num_steps=5, num_targets=1),
    attacks.build("square", few, num_queries=29),
  )
  yield from _searched("224", model, variables, images, labels, few_steps)


def _searched(
  name: str,
  model: models.Model,
  variables: Variables,
  images: np.ndarray,
  labels: np.ndarray,
  parts: Sequence[attacks.Attack],
) -> Iterator[Row]:
  """A row for each part of AutoAttack, run alone on all images."""
  predict = step.make_predict(model)
  forward, pair = passes.seconds_of_passes(predict, variables, images, labels)
  compiled: list[str] = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event)
  )
  for part in parts:
    compiled.clear()
    call = functools.partial(
      evaluate.run, predict, images, labels, part, params=variables
    )
    call()
    count = sum("backend_compile" in event for event in compiled)
    result = call()
    work = result.work[part.name]
    backward = work.backward + work.padding_backward
    total = work.forward + work.padding_forward + backward
    bare = backward * pair + (total - 2 * backward) * forward
    yield row(
      "autoattack",
      f"{part.name} {name}, {len(images)} images",
      work.seconds,
      passes_per_s=total / work.seconds,
      share_of_floor=bare / work.seconds,
      passes=total,
      programs=count,
      robust=int(result.robust.sum()),
    )
