"""Passes through a model: their seconds and their FLOPs."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import keys, losses, models, peft, sharding, state, step, trees
from roli_jax.bench import timing, workload
from roli_jax.bench.timing import Row, row
from roli_jax.evaluate import classifier
from roli_jax.types import Images, Labels, Logits, Params, Variables


def backbones(config: Mapping[str, Any]) -> Iterator[Row]:
  """A forward pass, and an attack's gradient by the pixels, at 224.

  The gradient is one step of a loop of two: XLA computes otherwise in loops.

  The floor is the counted FLOPs at the rate of the square matmul. Memory is
  what the compiled program holds beside its arguments.
  """
  ceiling, rate = timing.matmul(config["runs"])
  yield ceiling
  for name in config["backbones"]:
    yield from _backbone(name, rate, config)


def _backbone(
  name: str, rate: float, config: Mapping[str, Any]
) -> Iterator[Row]:
  """The rows of one backbone; `rate` is the matmul's, in FLOP/s."""
  size = config["backbone_batch"]
  model = models.create(name, 1000)
  variables = jax.jit(model.init)(keys.root(0))
  batch = workload.random_batch(model, size)
  images = batch["image"] / np.float32(255)

  def forward(variables: Variables, x: Images) -> Logits:
    return model.logits(*variables, x)

  def loss(variables: Variables, x: Images) -> jax.Array:
    return losses.cross_entropy(forward(variables, x), batch["label"]).sum()

  gradient = jax.grad(loss, argnums=1)

  def attack(variables: Variables, x: jax.Array) -> jax.Array:
    def move(_: jax.Array, x: jax.Array) -> jax.Array:
      return x + 0.01 * jnp.sign(gradient(variables, x))

    return jax.lax.fori_loop(0, 2, move, x)

  # XLA counts a loop's body once, so a gradient is counted outside of it.
  for what, timed, times, counted in (
    ("forward", forward, 1, forward),
    ("gradient", attack, 2, gradient),
  ):
    compiled = jax.jit(timed).lower(variables, images).compile()
    call = functools.partial(compiled, variables, images)
    seconds = timing.median(call, config["backbone_runs"]) / times
    flops = timing.flops(counted, variables, images)
    yield row(
      "backbone",
      f"{name} {what}, batch {size}",
      seconds,
      images_per_s=size / seconds,
      gflops=flops / seconds / 1e9,
      share_of_floor=flops / rate / seconds,
      mib=timing.held_mib(compiled),
    )


def count_flops(
  model: models.Model,
  method: peft.Method,
  now: state.TrainState,
  batch: workload.Batch,
) -> float:
  """FLOPs of a step by its passes: K gradients, a forward, and the update's.

  XLA counts a loop's body once, so each pass is counted by itself.

  Args:
    model: the classifier, without the method's modules.
    method: chooses the leaves that train.
    now: the state before the step.
    batch: images, labels and indices.
  """
  images = batch["image"] / np.float32(255)
  predict = step.make_predict(method.apply_to(model))

  def loss(variables: Variables, x: Images) -> jax.Array:
    return losses.cross_entropy(predict(variables, x), batch["label"]).sum()

  def trained_loss(trained: Params, frozen: Params) -> jax.Array:
    return loss((trees.merge(trained, frozen), now.stats), images)

  variables = (now.params, now.stats)
  in_pixels = timing.flops(jax.grad(loss, argnums=1), variables, images)
  forward = timing.flops(loss, variables, images)
  update = timing.flops(jax.grad(trained_loss), *method.split(now.params))
  return workload.NUM_STEPS * in_pixels + forward + update


def seconds_of_passes(
  predict: Callable[[Variables, Images], Logits],
  variables: Variables,
  images: np.ndarray,
  labels: np.ndarray,
) -> tuple[float, float]:
  """An image's seconds of a forward pass, and of one with its gradient."""
  mesh = sharding.mesh()
  unit = classifier.SMALLEST * mesh.size
  rows = np.arange(-(-len(images) // unit) * unit) % len(images)
  placed = sharding.put((images[rows], labels[rows]), mesh)

  def forward(variables: Variables, x: Images, labels: Labels) -> jax.Array:
    return losses.log_odds(predict(variables, x), labels)

  def loss(variables: Variables, x: Images, labels: Labels) -> jax.Array:
    return forward(variables, x, labels).sum()

  fns = {"forward": forward, "gradient": jax.grad(loss, argnums=1)}
  calls = {}
  for name, fn in fns.items():
    in_eights = jax.jit(functools.partial(classifier.map_in_eights, fn, mesh))
    calls[name] = functools.partial(in_eights, variables, placed)
  seconds = timing.medians(calls, 5)
  return seconds["forward"] / len(rows), seconds["gradient"] / len(rows)
