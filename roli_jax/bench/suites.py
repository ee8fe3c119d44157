"""What is measured, each beside its floor or its baseline."""

import functools
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import (
  attacks,
  convert,
  data,
  evaluate,
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
from roli_jax.bench import eager, loader, timing
from roli_jax.data.source import num_cores
from roli_jax.evaluate import classifier
from roli_jax.optim import schedules
from roli_jax.threat import ThreatModel

Row = dict[str, Any]
NUM_STEPS = 7  # of PGD in a training step, as in RoLI
EPS = 0.1  # its radius, in Linf


def _batch(model, size):
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


def matmul(runs: int, side: int = 2048) -> tuple[Row, float]:
  """This machine's rate at a large square product, in FLOP/s."""
  seconds = timing.medians({"": _product(side)}, runs)[""]
  rate = 2 * side**3 / seconds
  return _row("step", f"matmul {side}", seconds, gflops=rate / 1e9), rate


def _product(side, dtype="float32"):
  a = jnp.ones((side, side), dtype)
  product = jax.jit(jnp.matmul)
  return lambda: product(a, a)


def steps(config: Mapping[str, Any]) -> Iterator[Row]:
  """The PGD step against its floor: counted FLOPs at the rate of a matmul."""
  row, rate = matmul(config["runs"])
  yield row
  model = models.create(config["model"], 10)
  everywhere = sharding.mesh()
  for size in config["batch_sizes"]:
    batch = _batch(model, size)
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
      yield _row(
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
  products = {"JAX": _product(side, dtype), "torch": eager.product(side, dtype)}
  rate = 0.0
  for name, seconds in timing.medians(products, config["runs"]).items():
    here = 2 * side**3 / seconds
    rate = max(rate, here)
    yield _row(
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
      yield _row(
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
  batch = _batch(model, size)
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
  batch = sharding.put(_batch(model, size), everywhere)
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
    yield _row(
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
    lowered = stepped.lower(now, _batch(model, size), keys.root(0))
    held: Any = lowered.compile().memory_analysis()
    yield _row(
      "memory",
      f"{name} {method} batch {size}, {saving}",
      time.perf_counter() - started,
      mib=held.temp_size_in_bytes / 2**20,
      state_mib=sum(x.nbytes for x in jax.tree.leaves(now)) / 2**20,
    )


def seeds(config: Mapping[str, Any]) -> Iterator[Row]:
  """Five seeds by vmap against one after another, the same total work."""
  model = models.create(config["model"], 10)
  batch = _batch(model, 64)
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
    yield _row("seeds", name, seconds, images_per_s=5 * 64 / seconds)


def compiling(config: Mapping[str, Any]) -> Iterator[Row]:
  """From the first call of a step to its end, without any cache."""
  model = models.create(config["model"], 10)
  batch = _batch(model, 64)
  jax.config.update("jax_enable_compilation_cache", False)
  for name in config["methods"]:
    train_step, now = _training(model, peft.METHODS[name]())
    started = time.perf_counter()
    traced = jax.jit(train_step).trace(now, batch, keys.root(0))
    tracing = time.perf_counter() - started
    traced.lower().compile()
    whole = time.perf_counter() - started
    yield _row("compile", f"{name} step: trace", tracing)
    yield _row("compile", f"{name} step: lower, compile", whole - tracing)
  jax.config.update("jax_enable_compilation_cache", True)


def imports(config: Mapping[str, Any]) -> Iterator[Row]:
  """A fresh Python that imports, against one that imports JAX alone."""
  for line in ("import jax", "from roli_jax import attacks, evaluate, threat"):
    times = []
    for _ in range(5):
      started = time.perf_counter()
      subprocess.run([sys.executable, "-c", line], check=True)
      times.append(time.perf_counter() - started)
    yield _row("import", line, statistics.median(times))


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
    yield _row(
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


def backbones(config: Mapping[str, Any]) -> Iterator[Row]:
  """A forward pass, and an attack's gradient by the pixels, at 224.

  The gradient is one step of a loop of two: XLA computes otherwise in loops.

  The floor is the counted FLOPs at the rate of the square matmul. Memory is
  what the compiled program holds beside its arguments.
  """
  row, rate = matmul(config["runs"])
  yield row
  size = config["backbone_batch"]
  for name in config["backbones"]:
    model = models.create(name, 1000)
    variables = jax.jit(model.init)(keys.root(0))
    batch = _batch(model, size)
    images = batch["image"] / np.float32(255)

    def forward(variables, x, model=model):
      return model.logits(*variables, x)

    def gradient(variables, x, forward=forward, labels=batch["label"]):
      return jax.grad(
        lambda x: losses.cross_entropy(forward(variables, x), labels).sum()
      )(x)

    def attack(variables, x, gradient=gradient):
      def step(_, x):
        return x + 0.01 * jnp.sign(gradient(variables, x))

      return jax.lax.fori_loop(0, 2, step, x)

    for fn, times in ((forward, 1), (attack, 2)):
      compiled = jax.jit(fn).lower(variables, images).compile()
      call = functools.partial(compiled, variables, images)
      seconds = timing.medians({"": call}, config["backbone_runs"])[""]
      # Of one gradient: XLA counts a loop's body once.
      counted = timing.flops(gradient if times == 2 else fn, variables, images)
      memory: Any = compiled.memory_analysis()
      each = seconds / times
      yield _row(
        "backbone",
        f"{name} {'gradient' if times == 2 else 'forward'}, batch {size}",
        each,
        images_per_s=size / each,
        gflops=counted / each / 1e9,
        share_of_floor=counted / rate / each,
        mib=memory.temp_size_in_bytes / 2**20,
      )


SUITES = {
  "import": imports,
  "compile": compiling,
  "step": steps,
  "against_torch": against_torch,
  "memory": memory,
  "recipes": recipes,
  "seeds": seeds,
  "backbone": backbones,
  "autoattack": searches,
  "loader": loader.loader,
}


def _row(suite: str, name: str, seconds: float, **more: Any) -> Row:
  return {"suite": suite, "name": name, "seconds": seconds, **more}
