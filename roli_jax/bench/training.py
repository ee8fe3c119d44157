"""Steps of training: seconds and memory."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from roli_jax import keys, models, peft, sharding, state
from roli_jax.bench import passes, timing, workload
from roli_jax.bench.timing import Row, row

_STEP = f"PGD-{workload.NUM_STEPS}"


def _placed(now: state.TrainState, batch: workload.Batch) -> tuple[Any, ...]:
  """A step's arguments over all devices: state, batch and key."""
  mesh = sharding.mesh()
  return sharding.replicate(now, mesh), sharding.put(batch, mesh), keys.root(0)


def steps(config: Mapping[str, Any]) -> Iterator[Row]:
  """The PGD step against its floor: counted FLOPs at the rate of a matmul."""
  ceiling, rate = timing.matmul(config["runs"])
  yield ceiling
  model = models.create(config["model"], 10)
  for size, name in itertools.product(config["batch_sizes"], config["methods"]):
    method = peft.METHODS[name]()
    batch = workload.random_batch(model, size)
    train_step, now = workload.build_step(model, method)
    flops = passes.count_flops(model, method, now, batch)
    call = functools.partial(jax.jit(train_step), *_placed(now, batch))
    seconds = timing.median(call, config["runs"])
    yield row(
      "step",
      f"{name} {_STEP} batch {size}",
      seconds,
      images_per_s=size / seconds,
      gflops=flops / seconds / 1e9,
      share_of_floor=flops / rate / seconds,
    )


# What the field adds to the step: keywords of `workload.build_step`.
RECIPES: dict[str, dict[str, Any]] = {
  "adamw": {},
  **{name: {"anchor": name} for name in ("l2sp", "ftp", "spd", "digrap")},
  **{name: {"loss": name} for name in ("trades", "mart")},
  "awp": {"gamma": 0.01},
}


def recipes(config: Mapping[str, Any]) -> Iterator[Row]:
  """Each recipe's full step beside plain AdamW's, all of them taking turns.

  Memory: what the compiled step holds beside its arguments, and the state that
  it carries from step to step.
  """
  model = models.create(config["model"], 10)
  size = config["batch_sizes"][0]
  batch = workload.random_batch(model, size)
  calls: dict[str, Callable[[], Any]] = {}
  memory: dict[str, dict[str, float]] = {}
  for name, options in RECIPES.items():
    train_step, now = workload.build_step(model, peft.full(), **options)
    args = _placed(now, batch)
    compiled = jax.jit(train_step).lower(*args).compile()
    calls[name] = functools.partial(compiled, *args)
    memory[name] = _memory(compiled, now)
  medians = timing.medians(calls, config["runs"])
  for name, seconds in medians.items():
    yield row(
      "recipes",
      f"{name} {_STEP} batch {size}",
      seconds,
      images_per_s=size / seconds,
      times_adamw=seconds / medians["adamw"],
      **memory[name],
    )


# What may save memory in a step: options of the model, and parts of the batch.
SAVINGS: dict[str, tuple[dict[str, Any], int]] = {
  "as it is": ({}, 1),
  "bfloat16": ({"dtype": "bfloat16"}, 1),
  "remat": ({"remat": True}, 1),
  "remat and scan": ({"remat": True, "scan": True}, 1),
  "accumulate 4": ({}, 4),
}


def memory(config: Mapping[str, Any]) -> Iterator[Row]:
  """What a compiled step holds beside its arguments; it is not run.

  The plan is that of the XLA of this machine: a CPU's keeps more than an
  accelerator's. Full fine-tuning also with what saves memory. `seconds` are
  those of compiling.
  """
  size = config["memory_batch"]
  for name, method, saving in itertools.product(
    config["memory_models"], config["memory_methods"], SAVINGS
  ):
    if method != "full" and saving != "as it is":
      continue
    options, num_parts = SAVINGS[saving]
    model = models.with_options(models.create(name, 10), **options)
    train_step, now = workload.build_step(
      model, peft.METHODS[method](), num_parts=num_parts
    )
    batch = workload.random_batch(model, size)
    started = time.perf_counter()
    jitted = jax.jit(train_step, donate_argnums=0)
    compiled = jitted.lower(now, batch, keys.root(0)).compile()
    seconds = time.perf_counter() - started
    what = f"{name} {method} batch {size}, {saving}"
    yield row("memory", what, seconds, **_memory(compiled, now))


def _memory(
  compiled: jax.stages.Compiled, now: state.TrainState
) -> dict[str, float]:
  """MiB that a step holds beside its arguments, and those of its state."""
  num_bytes = sum(x.nbytes for x in jax.tree.leaves(now))
  return {"mib": timing.held_mib(compiled), "state_mib": num_bytes / 2**20}


def seeds(config: Mapping[str, Any]) -> Iterator[Row]:
  """Five seeds by vmap against one after another, the same total work."""
  model = models.create(config["model"], 10)
  batch = workload.random_batch(model, 64)
  train_step, now = workload.build_step(model, peft.full())
  five = jax.tree.map(lambda x: jnp.stack([x] * 5), now)
  one_step = jax.jit(train_step)
  five_steps = jax.jit(jax.vmap(train_step, (0, None, None)))
  key = keys.root(0)
  calls = {
    "5 seeds in turn": lambda: [one_step(now, batch, key) for _ in range(5)],
    "5 seeds by vmap": lambda: five_steps(five, batch, key),
  }
  for name, seconds in timing.medians(calls, config["runs"]).items():
    yield row("seeds", name, seconds, images_per_s=5 * 64 / seconds)


def compiling(config: Mapping[str, Any]) -> Iterator[Row]:
  """Seconds of tracing and of compiling a step, without any cache."""
  model = models.create(config["model"], 10)
  batch = workload.random_batch(model, 64)
  jax.config.update("jax_enable_compilation_cache", False)
  for name in config["methods"]:
    train_step, now = workload.build_step(model, peft.METHODS[name]())
    started = time.perf_counter()
    traced = jax.jit(train_step).trace(now, batch, keys.root(0))
    tracing = time.perf_counter() - started
    traced.lower().compile()
    whole = time.perf_counter() - started
    yield row("compile", f"{name} step: trace", tracing)
    yield row("compile", f"{name} step: lower, compile", whole - tracing)
  jax.config.update("jax_enable_compilation_cache", True)
