"""What `--mode=bench` can measure, by name."""

import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import keys, losses, models
from roli_jax.bench import loader, searches, timing, training
from roli_jax.bench.timing import Row, matmul, row


def imports(config: Mapping[str, Any]) -> Iterator[Row]:
  """A fresh Python that imports, against one that imports JAX alone."""
  for line in ("import jax", "from roli_jax import attacks, evaluate, threat"):
    times = []
    for _ in range(5):
      started = time.perf_counter()
      subprocess.run([sys.executable, "-c", line], check=True)
      times.append(time.perf_counter() - started)
    yield row("import", line, statistics.median(times))


def backbones(config: Mapping[str, Any]) -> Iterator[Row]:
  """A forward pass, and an attack's gradient by the pixels, at 224.

  The gradient is one step of a loop of two: XLA computes otherwise in loops.

  The floor is the counted FLOPs at the rate of the square matmul. Memory is
  what the compiled program holds beside its arguments.
  """
  ceiling, rate = matmul(config["runs"])
  yield ceiling
  size = config["backbone_batch"]
  for name in config["backbones"]:
    model = models.create(name, 1000)
    variables = jax.jit(model.init)(keys.root(0))
    batch = training.batch_of(model, size)
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
      yield row(
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
  "compile": training.compiling,
  "step": training.steps,
  "against_torch": training.against_torch,
  "memory": training.memory,
  "recipes": training.recipes,
  "seeds": training.seeds,
  "backbone": backbones,
  "autoattack": searches.searches,
  "loader": loader.loader,
}
