"""AutoAttack's parts against the bare passes through the model."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from roli_jax import (
  attacks,
  convert,
  data,
  evaluate,
  keys,
  losses,
  models,
  sharding,
  step,
)
from roli_jax.bench import timing
from roli_jax.bench.timing import Row, row
from roli_jax.evaluate import classifier
from roli_jax.threat import ThreatModel


def searches(config: Mapping[str, Any]) -> Iterator[Row]:
  """AutoAttack's parts against the bare passes through the model.

  On the shipped network all of AutoAttack, each attack alone on all images;
  on a random ViT-S/16 at 224 a few steps, for the rate of passes.
  """
  bundle = convert.load(convert.find("glyph_vit", "robust"))
  letters = data.build("letters", "val").take(
    np.arange(config["attack_images"])
  )
  small = (bundle.model, (bundle.params, bundle.stats))
  threat = ThreatModel("linf", 0.1)
  yield from _searched(
    "8x8", *small, letters.pixels(), letters.labels,
    attacks.AutoAttack(threat).parts,
  )  # fmt: skip
  if not config["attack_images_224"]:
    return
  model = models.create("vit_s16", 1000)
  shape = (config["attack_images_224"], 224, 224, 3)
  images = np.random.default_rng(0).uniform(size=shape).astype(np.float32)
  variables = model.init(keys.root(0))
  labels = np.asarray(step.make_predict(model)(variables, images).argmax(-1))
  few = ThreatModel("linf", 1e-6)  # nothing breaks: all steps are taken
  parts = (
    attacks.build("apgd_ce", few, num_steps=9),
    attacks.build("apgd_t", few, num_steps=9, num_targets=1),
    attacks.build("fab_t", few, num_steps=5, num_targets=1),
    attacks.build("square", few, num_queries=29),
  )
  yield from _searched("224", model, variables, images, labels, parts)


def _searched(name, model, variables, images, labels, parts):
  predict = step.make_predict(model)
  forward, pair = _passes(predict, variables, images, labels)
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
      "autoattack", f"{part.name} {name}, {len(images)} images", work.seconds,
      passes_per_s=total / work.seconds, share_of_floor=bare / work.seconds,
      passes=total, programs=count, robust=int(result.robust.sum()),
    )  # fmt: skip


def _passes(predict, variables, images, labels):
  """Seconds of a forward pass, and of one with its gradient, of an image."""
  mesh = sharding.mesh()
  unit = classifier.SMALLEST * mesh.size
  rows = np.arange(-(-len(images) // unit) * unit) % len(images)
  placed = sharding.put((images[rows], labels[rows]), mesh)

  def forward(variables, images, labels):
    return losses.log_odds(predict(variables, images), labels)

  def gradient(variables, images, labels):
    return jax.grad(lambda x: forward(variables, x, labels).sum())(images)

  calls = {}
  for fn in (forward, gradient):
    jitted = jax.jit(
      lambda v, x, fn=fn: classifier.map_in_eights(fn, mesh, v, x)
    )
    calls[fn.__name__] = functools.partial(jitted, variables, placed)
  seconds = timing.medians(calls, 5)
  return tuple(seconds[name] / len(rows) for name in calls)
