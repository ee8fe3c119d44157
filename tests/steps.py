"""Two training steps on whatever devices there are.

As one of several processes: python -m tests.steps OUT HOST:PORT NUM PROCESS.
"""

import pathlib
import sys
from typing import Any

import jax
import numpy as np

from roli_jax import distributed, keys, sharding, step, trees
from roli_jax.experiment import stages
from roli_jax.experiment.build import build_model
from roli_jax.experiment.program import build_program
from roli_jax.experiment.run import (
  Run,
  build_run,
  expand_stages,
  training_images,
)
from roli_jax.experiment.start_and_resume import initial_variables


def config(*rules: tuple, model: int = 1) -> dict[str, Any]:
  """Full fine-tuning from a random head, by rules on so many devices.

  An average of the weights is kept.
  """
  from configs import glyphs_roli

  made = glyphs_roli.get_config("init=ranli").to_dict()
  made["adapt"]["ema"] = 0.9
  return {**made, "mesh": {"model": model, "rules": rules}}


def begin(made: Run, stage: stages.Stage) -> tuple[Any, Any, Any]:
  """The program, and what its step takes first and last."""
  program = build_program(made, stage)
  now = program.create(*initial_variables(made, stage))
  key = sharding.replicate(keys.root(0), made.mesh)
  return program, sharding.place(now, program.abstract_state), key


def batch(source: Any, k: int) -> dict[str, np.ndarray]:
  """This process's part of the 64 images of the batch k."""
  rows = np.arange(64 * k, 64 * (k + 1))
  rows = rows[jax.process_index() :: jax.process_count()]
  return {
    "image": source.images[rows],
    "label": source.labels[rows],
    "index": source.indices[rows],
  }


def two_steps(config: dict[str, Any]) -> tuple[Any, Any]:
  """The state and the counts after two steps."""
  made = build_run(config)
  (stage,) = expand_stages(made)
  program, now, key = begin(made, stage)
  source = training_images(made, stage)
  for k in range(2):
    placed = sharding.put(batch(source, k), made.mesh)
    with jax.transfer_guard("disallow"):
      now, counts = program.step(now, placed, key)
    jax.block_until_ready(now)
  assert program.step._cache_size() == 1
  return now, counts


def attacked(config: dict[str, Any]) -> dict[int, np.ndarray]:
  """The first batch's images, attacked before any step, by who they are."""
  made = build_run(config)
  (stage,) = expand_stages(made)
  program, now, key = begin(made, stage)
  predict = step.make_predict(build_model(made, stage))

  @jax.jit
  def attack(variables, key, images, labels, indices):
    image_keys = keys.per_image(key, indices)
    return program.attack(
      lambda x: predict(variables, x), images, labels, image_keys
    )

  of = batch(training_images(made, stage), 0)
  arrays = (of["image"] / np.float32(16), of["label"], of["index"])
  placed = sharding.put(arrays, made.mesh)
  found = attack((now.params, now.stats), key, *placed)
  who, images = sharding.fetch((placed[2], found))
  return dict(zip(who.tolist(), images, strict=True))


if __name__ == "__main__":
  out, address, num, process = sys.argv[1:]
  distributed.connect(address, int(num), int(process))
  images = attacked(config())
  after = sharding.fetch(two_steps(config())[0].params)
  if distributed.leads():
    named = {str(i): image for i, image in images.items()}
    np.savez(pathlib.Path(out), **named, **trees.paths(after))
