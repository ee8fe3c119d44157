"""Steps of training: seconds, memory, and PyTorch beside them."""

import functools
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import (
  attacks,
  keys,
  losses,
  models,
  optim,
  peft,
  sharding,
  state,
  step,
  trees,
)
from roli_jax.bench import eager, timing
from roli_jax.bench.timing import Row, matmul, product, row
from roli_jax.data.source import num_cores
from roli_jax.optim import schedules
from roli_jax.threat import ThreatModel

NUM_STEPS = 7  # of PGD in a training step, as in RoLI
EPS = 0.1  # its radius, in Linf


def batch_of(model: models.Model, size: int) -> dict[str, np.ndarray]:
  """Random images of the model's size, uint8, their labels and indices."""
  shape = (size, model.image_size, model.image_size, model.channels)
  rng = np.random.default_rng(0)
  return {
    "image": rng.integers(0, 256, shape, dtype=np.uint8),
    "label": rng.integers(0, model.num_classes, size, dtype=np.int32),
    "index": np.arange(size, dtype=np.uint32),
  }


def _attack(loss="ce"):
  return attacks.build("pgd", ThreatModel("linf", EPS), num_steps=NUM_STEPS,
                       loss=loss)  # fmt: skip


def _training(
  model, method, *, loss="at", anchor="none", gamma=0.0, num_parts=1
):
  """A PGD step, and the state before it; nothing is donated."""
  model = method.apply_to(model)
  params, stats = model.init(keys.root(0))
  shape = schedules.warmup(100, 0.1, "cosine")
  near = {"anchor": {"name": anchor}, "head": "anchor_at_probe"}
  spec = {"name": "adamw", **near}
  objective = losses.OBJECTIVES[loss]()
  awp = step.WeightAttack(gamma)
  tx = optim.build(spec, method.labels(params), shape)
  attack = _attack(objective.surrogate)
  train_step = step.make_train_step(
    model, method, objective, attack, schedules.ramp(100), tx, awp=awp,
    num_parts=num_parts,
  )  # fmt: skip
  return train_step, state.create(params, stats, method.trains(params), tx)


def _counted(model, method, now, batch):
  """FLOPs of a step by its passes: K gradients, a forward, and the update's.

  XLA counts a loop's body once, so each pass is counted by itself.
  """
  images = batch["image"] / np.float32(255)
  predict = step.make_predict(method.apply_to(model))

  def loss(variables, x):
    return losses.cross_entropy(predict(variables, x), batch["label"]).sum()

  variables = (now.params, now.stats)
  in_pixels = timing.flops(jax.grad(loss, argnums=1), variables, images)
  forward = timing.flops(loss, variables, images)

  def of_trained(trained, frozen):
    return loss((trees.merge(trained, frozen), now.stats), images)

  halves = method.split(now.params)
  update = timing.flops(jax.grad(of_trained), *halves)
  return NUM_STEPS * in_pixels + forward + update


def steps(config: Mapping[str, Any]) -> Iterator[Row]:
  """The PGD step against its floor: counted FLOPs at the rate of a matmul."""
  ceiling, rate = matmul(config["runs"])
  yield ceiling
  model = models.create(config["model"], 10)
  everywhere = sharding.mesh()
  for size in config["batch_sizes"]:
    batch = batch_of(model, size)
    for name in config["methods"]:
      train_step, now = _training(model, peft.METHODS[name]())
      counted = _counted(model, peft.METHODS[name](), now, batch)
      call = functools.partial(
        jax.jit(train_step),
        sharding.replicate(now, everywhere),
        sharding.put(batch, everywhere),
        keys.root(0),
      )
      seconds = timing.medians({"": call}, config["runs"])[""]
      yield row(
        "step",
        f"{name} PGD-{NUM_STEPS} batch {size}",
        seconds,
        images_per_s=size / seconds,
        gflops=counted / seconds / 1e9,
        share_of_floor=counted / rate / seconds,
      )


def against_torch(config: Mapping[str, Any]) -> Iterator[Row]:
  """The PGD step beside PyTorch's, with the same weights and passes, in turns.

  On a CPU both compute in float32, with a thread for each core; on a GPU in
  bfloat16, and PyTorch's network is compiled. `times_ours`: PyTorch's seconds
  over ours, of the same turn; the median, and the quartiles around it. The
  floor is that of the work that has to be done, at the rate of the faster
  library's square matmul: gradients by weights inside an attack are not in it.

  Nothing else may run meanwhile. PyTorch's threads wait for each other, and on
  a machine that others use it loses up to ten times as much as we do.
  """
  reason = eager.lacking()
  if reason:
    yield {"suite": "against_torch", "name": f"skipped: {reason}"}
    return
  threads = num_cores()  # as many as XLA has
  eager.set_num_threads(threads)
  side, dtype, sizes = 2048, "float32", (config["torch_batch"],)
  options = {}
  if jax.default_backend() == "gpu":
    side, dtype, sizes = 8192, "bfloat16", config["torch_batch_sizes_gpu"]
    options = {"dtype": dtype, "attention": config["torch_attention_gpu"]}
  products = {"JAX": product(side, dtype), "torch": eager.product(side, dtype)}
  rate = 0.0
  for name, seconds in timing.medians(products, config["runs"]).items():
    here = 2 * side**3 / seconds
    rate = max(rate, here)
    yield row(
      "against_torch", f"matmul {side}, {name}", seconds, gflops=here / 1e9,
      threads=threads,
    )  # fmt: skip
  for name, size, method in itertools.product(
    config["torch_models"], sizes, ("full", "linear")
  ):
    counted, passes, calls = _both(name, size, method, options)
    times = timing.turns(calls, config["torch_pairs"])
    for which, values in times.items():
      seconds = statistics.median(values)
      low, ratio, high = timing.ratios(values, times["ours"])
      yield row(
        "against_torch",
        f"{name} {method} PGD-{NUM_STEPS} batch {size}, {which}",
        seconds,
        images_per_s=size / seconds,
        share_of_floor=counted / rate / seconds,
        times_ours=ratio,
        quartiles=(low, high),
        passes=passes,
        pairs=config["torch_pairs"],
        threads=threads,
      )


def _both(name, size, method, options):
  """A step's FLOPs, its passes, and calls of it: ours, and PyTorch's."""
  model = models.create(name, 10)
  batch = batch_of(model, size)
  train_step, now = _training(
    models.with_options(model, **options), peft.METHODS[method]()
  )
  counted = _counted(model, peft.METHODS[method](), now, batch)
  in_attack = _attack().passes
  passes = (in_attack[0] + 1, in_attack[1] + 1)  # and the update's
  net = eager.like(model, now.params)
  calls = {"ours": _carried(train_step, now, batch)}
  for form, frozen in eager.FORMS.items():
    call = eager.make_step(net, method, batch, EPS, NUM_STEPS, frozen)
    made = eager.passes(net, call)
    assert made == passes, f"torch makes {made} passes, we make {passes}"
    calls[f"torch, {form}"] = call
  return counted, sum(passes), calls


def _carried(train_step, now, batch):
  """A call of the step from where the last has left; its state is donated."""
  jitted = jax.jit(train_step, donate_argnums=0)
  batch, key = jax.device_put((batch, keys.root(0)))

  def call():
    nonlocal now
    now, counts = jitted(now, batch, key)
    return now, counts

  return call


# What the field adds to the step: keywords of `_training`.
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
  everywhere = sharding.mesh()
  size = config["batch_sizes"][0]
  batch = sharding.put(batch_of(model, size), everywhere)
  calls: dict[str, Any] = {}
  memory, kept = {}, {}
  for name, options in RECIPES.items():
    train_step, now = _training(model, peft.full(), **options)
    args = (sharding.replicate(now, everywhere), batch, keys.root(0))
    compiled = jax.jit(train_step).lower(*args).compile()
    calls[name] = functools.partial(compiled, *args)
    held: Any = compiled.memory_analysis()
    memory[name] = held.temp_size_in_bytes / 2**20
    kept[name] = sum(x.nbytes for x in jax.tree.leaves(now)) / 2**20
  medians = timing.medians(calls, config["runs"])
  for name, seconds in medians.items():
    yield row(
      "recipes",
      f"{name} PGD-{NUM_STEPS} batch {size}",
      seconds,
      images_per_s=size / seconds,
      times_adamw=seconds / medians["adamw"],
      mib=memory[name],
      state_mib=kept[name],
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

  As the XLA of where this runs plans it: a CPU's keeps more than an
  accelerator's. Full fine-tuning also with what saves memory. `seconds` are of
  compiling.
  """
  size = config["memory_batch"]
  for name, method, saving in itertools.product(
    config["memory_models"], config["memory_methods"], SAVINGS
  ):
    if method != "full" and saving != "as it is":
      continue
    options, num_parts = SAVINGS[saving]
    model = models.with_options(models.create(name, 10), **options)
    train_step, now = _training(
      model, peft.METHODS[method](), num_parts=num_parts
    )
    started = time.perf_counter()
    stepped = jax.jit(train_step, donate_argnums=0)
    lowered = stepped.lower(now, batch_of(model, size), keys.root(0))
    held: Any = lowered.compile().memory_analysis()
    yield row(
      "memory",
      f"{name} {method} batch {size}, {saving}",
      time.perf_counter() - started,
      mib=held.temp_size_in_bytes / 2**20,
      state_mib=sum(x.nbytes for x in jax.tree.leaves(now)) / 2**20,
    )


def seeds(config: Mapping[str, Any]) -> Iterator[Row]:
  """Five seeds by vmap against one after another, the same total work."""
  model = models.create(config["model"], 10)
  batch = batch_of(model, 64)
  train_step, now = _training(model, peft.full())
  many = jax.tree.map(lambda x: jnp.stack([x] * 5), now)
  one = jax.jit(train_step)
  all_of_them = jax.jit(jax.vmap(train_step, (0, None, None)))
  key = keys.root(0)
  calls = {
    "5 seeds in turn": lambda: [one(now, batch, key) for _ in range(5)],
    "5 seeds by vmap": lambda: all_of_them(many, batch, key),
  }
  for name, seconds in timing.medians(calls, config["runs"]).items():
    yield row("seeds", name, seconds, images_per_s=5 * 64 / seconds)


def compiling(config: Mapping[str, Any]) -> Iterator[Row]:
  """From the first call of a step to its end, without any cache."""
  model = models.create(config["model"], 10)
  batch = batch_of(model, 64)
  jax.config.update("jax_enable_compilation_cache", False)
  for name in config["methods"]:
    train_step, now = _training(model, peft.METHODS[name]())
    started = time.perf_counter()
    traced = jax.jit(train_step).trace(now, batch, keys.root(0))
    tracing = time.perf_counter() - started
    traced.lower().compile()
    whole = time.perf_counter() - started
    yield row("compile", f"{name} step: trace", tracing)
    yield row("compile", f"{name} step: lower, compile", whole - tracing)
  jax.config.update("jax_enable_compilation_cache", True)
