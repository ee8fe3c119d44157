"""The first minutes on a chip: `make bench-chip`, one command.

`python -m roli_jax.bench.chip` runs a list of parts, each in a process of its
own, so that a compiler that aborts, a part that hangs or memory that runs out
costs that part alone. It needs JAX, flax, optax and this package, no more.

Whether the numbers are right comes first: against this machine's CPU, and
against themselves. Then speed, beside what the compiled programs' own products
and traffic allow.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import attacks, evaluate, keys, models, peft, step
from roli_jax.bench import searches, timing, workload
from roli_jax.bench.timing import Row, row
from roli_jax.plan import chips, compiler

CONFIG: dict[str, Any] = {
  "budget_s": 480.0,  # of all parts together
  "families": (
    "glyph_vit", "glyph_swin", "glyph_convnext", "glyph_resnet", "glyph_wrn",
  ),
  "models": ("vit_b16", "resnet50"),
  "methods": ("full", "linear"),
  "batch_sizes": (16, 32, 64, 128, 256, 512),
  "runs": 5,
  "numbers": 64,  # images whose numbers are compared
  "attack_images_224": 64,
}  # fmt: skip

# By `device_kind`: what the chip is in `chips.CHIPS`.
_KINDS = {
  "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e",
  "A100": "a100", "H100": "h100", "H200": "h200",
}  # fmt: skip
_EPS = 0.06  # of the numbers' attacks: about half of the images fall


def environment(config: Mapping[str, Any]) -> Iterator[Row]:
  """What this runs on."""
  device, started = jax.devices()[0], time.perf_counter()
  jax.block_until_ready(jnp.ones(8) + 1)
  memory: Any = device.memory_stats() or {}
  yield row(
    "environment",
    f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}",
    time.perf_counter() - started,
    gib=memory.get("bytes_limit", 0) / 2**30,
  )


def _numbers(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Features, logits, PGD's images and AutoAttack's flags on noise."""
  model, variables = workload.shipped()
  rng = np.random.default_rng(0)
  shape = (config["numbers"], model.image_size, model.image_size, 1)
  images = rng.uniform(size=shape).astype(np.float32)
  with jax.default_matmul_precision("highest"):
    both = jax.jit(step.make_both(model))
    features, logits = both(variables, images)
  labels = np.asarray(logits.argmax(-1))
  predict, pgd = step.make_predict(model), workload.attack(eps=_EPS)
  judge = functools.partial(evaluate.run, predict, images, labels)
  found = judge(pgd, params=variables)
  broken = judge(attacks.build("autoattack", pgd.threat), params=variables)
  return {
    "features": np.asarray(features),
    "logits": np.asarray(logits),
    "pgd": found.adv,
    "pgd_robust": found.robust,
    "autoattack_robust": broken.robust,
  }


def numbers(config: Mapping[str, Any]) -> Iterator[Row]:
  """The chip's numbers beside the CPU's; a process there computes those."""
  here = pathlib.Path(config["folder"])
  reference = _start("reference", config, here, {"JAX_PLATFORMS": "cpu"})
  ours = _numbers(config)
  if reference.wait():
    raise RuntimeError("the CPU's numbers failed; see reference.log")
  with np.load(here / "reference.npz") as file:
    theirs = dict(file)
  for name in ("features", "logits"):
    error = np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()
    yield {"suite": "numbers", "name": f"{name}, largest error",
           "error": float(error)}  # fmt: skip
  same = float((np.abs(ours["pgd"] - theirs["pgd"]) < 1e-6).mean())
  yield {"suite": "numbers", "name": "PGD-7, pixels equal", "share": same}
  for name in ("pgd_robust", "autoattack_robust"):
    equal = int((ours[name] == theirs[name]).sum())
    yield {"suite": "numbers", "name": f"{name}, flags equal",
           "share": equal / len(ours[name]), "robust": int(ours[name].sum()),
           "robust_cpu": int(theirs[name].sum())}  # fmt: skip


def reference(config: Mapping[str, Any]) -> Iterator[Row]:
  """The numbers of this process's device, for `numbers` to read."""
  file = pathlib.Path(config["folder"]) / "reference.npz"
  arrays: dict[str, Any] = _numbers(config)
  np.savez(file, **arrays)
  yield {"suite": "numbers", "name": "reference"}


def determinism(config: Mapping[str, Any]) -> Iterator[Row]:
  """Whether a step of training gives the same bits when it is made again."""
  model = models.create(config["families"][0], 10)
  train_step, now = workload.build_step(model, peft.full())
  batch = workload.random_batch(model, 64)
  call = jax.jit(train_step)
  first, again = (jax.device_get(call(now, batch, keys.root(0))) for _ in "ab")
  pairs = zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True)
  same = all(np.array_equal(a, b) for a, b in pairs)
  yield {"suite": "determinism", "name": "a step, twice", "same": same}


def families(config: Mapping[str, Any]) -> Iterator[Row]:
  """A step of full fine-tuning of a toy of each family: compiled and run."""
  for name in config["families"]:
    model = models.create(name, 10)
    train_step, now = workload.build_step(model, peft.full())
    batch = workload.random_batch(model, 16)
    started = time.perf_counter()
    _, counts = jax.jit(train_step)(now, batch, keys.root(0))
    loss = float(counts.loss)
    seconds = time.perf_counter() - started
    yield row("families", name, seconds, finite=bool(np.isfinite(loss)))


def steps(config: Mapping[str, Any], name: str, method: str) -> Iterator[Row]:
  """PGD-7 steps in bfloat16, by batch until more images gain nothing."""
  model = models.with_options(models.create(name, 10), dtype="bfloat16")
  train_step, now = workload.build_step(model, peft.METHODS[method]())
  best = 0.0
  for size in config["batch_sizes"]:
    batch = workload.random_batch(model, size)
    compiled = jax.jit(train_step).lower(now, batch, keys.root(0)).compile()
    call = functools.partial(compiled, now, jax.device_put(batch), keys.root(0))
    seconds = timing.median(call, config["runs"])
    yield row(
      "steps",
      f"{name} {method} PGD-{workload.NUM_STEPS} batch {size}",
      seconds,
      images_per_s=size / seconds,
      **_bound(compiled, seconds),
    )
    if size / seconds < 1.05 * best:
      return
    best = max(best, size / seconds)


def _bound(compiled: jax.stages.Compiled, seconds: float) -> dict[str, Any]:
  """What the program's products and traffic allow, by the plan's count."""
  kind = jax.devices()[0].device_kind
  known = [chip for part, chip in _KINDS.items() if kind.endswith(part)
           or f" {part} " in f"{kind} "]  # fmt: skip
  if not known:
    return {}
  target = chips.Target(known[0], known[0], (1,))
  counted = compiler.describe(compiled, target)
  products, traffic = counted["seconds_products"], counted["seconds_traffic"]
  return {
    "share_of_bound": max(products, traffic) / seconds,
    "ms_products": 1e3 * products,
    "ms_traffic": 1e3 * traffic,
  }


def against_torch(config: Mapping[str, Any]) -> Iterator[Row]:
  """The same steps beside compiled PyTorch, where it is installed."""
  from roli_jax.bench import against_torch as beside

  small = {
    "torch_models": config["models"][:1],
    "torch_batch": 8,
    "torch_batch_sizes_gpu": (64,),
    "torch_attention_gpu": "plain",
    "torch_pairs": config["runs"],
    "runs": config["runs"],
  }
  yield from beside.against_torch(small)


def traced(config: Mapping[str, Any]) -> Iterator[Row]:
  """One traced step, for a profile viewer; what is written, and its size."""
  model = models.create(config["families"][0], 10)
  train_step, now = workload.build_step(model, peft.full())
  batch, call = workload.random_batch(model, 64), jax.jit(train_step)
  jax.block_until_ready(call(now, batch, keys.root(0)))
  folder = pathlib.Path(config["folder"]) / "trace"
  with jax.profiler.trace(str(folder)):
    jax.block_until_ready(call(now, batch, keys.root(0)))
  size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
  yield {"suite": "trace", "name": "a step", "mib": size / 2**20}


Part = Callable[[Mapping[str, Any]], Iterator[Row]]


def parts(config: Mapping[str, Any]) -> dict[str, Part]:
  """The parts in their order: the most important first."""
  timed = {
    f"steps-{name}-{method}": functools.partial(steps, name=name, method=method)
    for name in config["models"]
    for method in config["methods"]
  }
  return {
    "environment": environment,
    "numbers": numbers,
    "determinism": determinism,
    "families": families,
    **timed,
    "autoattack": searches.at_224,
    "torch": against_torch,
    "trace": traced,
  }


def _start(
  part: str,
  config: Mapping[str, Any],
  folder: pathlib.Path,
  variables: Mapping[str, str],
) -> subprocess.Popen[bytes]:
  """A process that runs one part: rows to PART.jsonl, errors to PART.log."""
  file = folder / "config.json"
  file.write_text(json.dumps({**config, "folder": str(folder)}))
  module = "roli_jax.bench.chip"  # __name__ is __main__ in a part
  command = [sys.executable, "-m", module, "--part", part, str(file)]
  with (folder / f"{part}.log").open("w") as log:
    return subprocess.Popen(
      command, env={**os.environ, **variables}, stderr=log
    )


def _run_part(part: str, file: pathlib.Path) -> None:
  config = json.loads(file.read_text())
  known = {**parts(config), "reference": reference}
  with (file.parent / f"{part}.jsonl").open("w") as out:
    for each in known[part](config):
      print(json.dumps(each), file=out, flush=True)


def run(config: Mapping[str, Any], folder: pathlib.Path) -> list[Row]:
  """Runs the parts one after another while the budget lasts.

  Args:
    config: `CONFIG`, or what replaces its values.
    folder: gets `bench-chip.json`, and each part's rows.

  Returns:
    The rows of all parts. A part that failed, or had no time, has a row that
    says why; the rows that it had made before stand.
  """
  folder.mkdir(parents=True, exist_ok=True)
  ends = time.monotonic() + config["budget_s"]
  rows: list[Row] = []
  # A GPU's memory is not taken whole, since the parts' processes overlap.
  variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  for part in parts(config):
    left = ends - time.monotonic()
    reason = ""
    if left < 5:
      reason = f"no time left of {config['budget_s']:.0f} s"
    else:
      process = _start(part, config, folder, variables)
      try:
        if process.wait(left):
          said = (folder / f"{part}.log").read_text().strip().splitlines()
          reason = (said or [f"status {process.returncode}"])[-1]
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        reason = f"the budget of {config['budget_s']:.0f} s ran out"
    file = folder / f"{part}.jsonl"
    made = file.read_text().splitlines() if file.exists() else []
    new = [json.loads(line) for line in made]
    if reason:
      new.append({"suite": part, "name": f"stopped: {reason[:200]}"})
    print("\n".join(map(_line, new)), flush=True)
    rows += new
  (folder / "bench-chip.json").write_text(json.dumps(rows, indent=2) + "\n")
  return rows


def _line(each: Row) -> str:
  rest = {k: v for k, v in each.items() if k not in ("suite", "name")}
  values = "  ".join(
    f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
    for k, v in rest.items()
  )
  return f"{each['suite']:12} {each['name']:48} {values}"


def main(words: list[str]) -> None:
  """The command; `--part` is for its own processes."""
  parser = argparse.ArgumentParser(prog="python -m roli_jax.bench.chip")
  parser.add_argument("--part", default="")
  parser.add_argument(
    "--config.budget_s", dest="budget_s", type=float, default=CONFIG["budget_s"]
  )
  parser.add_argument("path", nargs="?", default="runs/bench-chip")
  given = parser.parse_args(words)
  if given.part:
    try:
      _run_part(given.part, pathlib.Path(given.path))
    except Exception:
      traceback.print_exc()
      sys.exit(1)
    return
  run({**CONFIG, "budget_s": given.budget_s}, pathlib.Path(given.path))


if __name__ == "__main__":
  main(sys.argv[1:])
