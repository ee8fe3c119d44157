"""One program of a run, compiled for a target in a process of its own.

A compiler may end its process, and no two targets' compilers go together in
one. So the plan calls this as a command, `python -m roli_jax.plan.compiler
ORDER.json RESULT.json`, with the target's variables in the environment.
"""

import hashlib
import inspect
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

from roli_jax.files import workdir
from roli_jax.plan import chips, hlo, hlo_text


def compile_apart(
  order: Mapping[str, Any], target: chips.Target, store: pathlib.Path
) -> dict[str, Any]:
  """Compiles a program in another process, unless it is known.

  Args:
    order: what `main` reads: `program`, its number, `target`, `turns`; the
      config lies as config.json in the store.
    target: that target.
    store: a directory of results by digest; made if it isn't there.

  Returns:
    `compiled`, `error`, and of a compiled program what `describe` says of it.

  Raises:
    ValueError: the config can't run on such devices.
  """
  store.mkdir(parents=True, exist_ok=True)
  asked, answer = store / "order.json", store / "answer.json"
  asked.write_text(json.dumps(order))
  answer.unlink(missing_ok=True)
  done = subprocess.run(
    [sys.executable, "-m", __name__, str(asked), str(answer)],
    env=os.environ | target.environment(),
    stderr=subprocess.PIPE,
    text=True,
    check=False,
  )
  if not answer.exists():
    raise RuntimeError(f"the program could not be built:\n{done.stderr}")
  said = json.loads(answer.read_text())
  if "refused" in said:
    raise ValueError(f"target={target.name}: {said['refused']}")
  digest, result = said["digest"], said["result"]
  if result is None:
    result = failure(_abort(done.returncode, done.stderr))
  if done.returncode in (0, -signal.SIGABRT):  # not where somebody killed it
    workdir.write_json(store / f"{digest}.json", result)
  return result


def main(asked: str, answer: str) -> None:
  """Compiles the program of an order and writes what there is to say of it."""
  from roli_jax.plan import programs

  order = json.loads(pathlib.Path(asked).read_text())
  target, file = chips.parse(order["target"]), pathlib.Path(answer)
  config = workdir.read_config(file.parent)
  try:
    lowered = programs.lower(config, order["program"], target)
  except ValueError as error:
    file.write_text(json.dumps({"refused": str(error)}))
    return
  digest = digest_of(lowered.as_text(), target, order.get("turns", 1))
  known = file.parent / f"{digest}.json"
  result = json.loads(known.read_text()) if known.exists() else None
  # Written before the compiler begins, which may not come back.
  file.write_text(json.dumps({"digest": digest, "result": result}))
  if result is not None:
    return
  started = time.perf_counter()
  try:
    result = describe(_compile(lowered), target, order.get("turns", 1))
  except jax.errors.JaxRuntimeError as error:
    result = failure(str(error))
  result["seconds_compiling"] = time.perf_counter() - started
  file.write_text(json.dumps({"digest": digest, "result": result}))


def digest_of(text: str, target: chips.Target, turns: int) -> str:
  """Returns what a result is kept by.

  Args:
    text: the program, before it is compiled.
    target: what it is compiled for.
    turns: how often a loop runs whose length is data: the text has no number
      for it, and what is counted hangs on it.
  """
  counting = inspect.getsource(hlo) + inspect.getsource(hlo_text)
  flags = os.environ.get("XLA_FLAGS", "")
  parts = [text, target.name, str(turns), flags, counting, *_versions()]
  return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
  """Compiles it; on a GPU, if Triton finds no tiles, with cuBLAS alone.

  On a GPU, XLA times several kernels for each product and takes the fastest.
  Here nothing can be timed, and Triton's default fails for some products, which
  the timing would have given to cuBLAS.
  """
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "Couldn't find output tile sizes" not in str(error):
      raise
  return lowered.compile({"xla_gpu_enable_triton_gemm": False})


def describe(
  compiled: Any, target: chips.Target, turns: int = 1
) -> dict[str, Any]:
  """Bytes, FLOPs and collectives of a compiled program, on one device.

  Args:
    compiled: a `jax.stages.Compiled`.
    target: what it was compiled for.
    turns: how often a loop runs whose length is data, >= 1.
  """
  chip = target.chip
  count = hlo.count(
    compiled.as_text(), on_chip=chip.platform == "tpu", turns=turns
  )
  memory = compiled.memory_analysis()
  arguments, temporaries = (
    memory.argument_size_in_bytes,
    memory.temp_size_in_bytes,
  )
  new = memory.output_size_in_bytes - memory.alias_size_in_bytes
  peak = getattr(memory, "peak_memory_in_bytes", 0)
  return {
    "compiled": True,
    "error": None,
    "argument_bytes": arguments,
    "temp_bytes": temporaries,
    "peak_bytes": peak or arguments + new + temporaries,
    "flops": count.flops,
    "traffic_bytes": count.traffic,
    "custom_call_bytes": count.custom_traffic,
    "seconds_products": count.flops / chip.peak,
    "seconds_traffic": count.traffic / chip.bandwidth,
    "collectives": {
      "in_loop": count.in_loop,
      "outside": count.outside,
      "bytes_in_loop": count.bytes_in_loop,
      "bytes_outside": count.bytes_outside,
    },
  }


def failure(message: str) -> dict[str, Any]:
  """What there is to say of a program that the compiler refused.

  If it says how much memory the program wants, that is the peak.
  """
  nothing = dict.fromkeys(
    (
      "argument_bytes", "temp_bytes", "peak_bytes", "flops", "traffic_bytes",
      "custom_call_bytes", "seconds_products", "seconds_traffic",
      "collectives",
    )
  )  # fmt: skip
  wanted = re.search(r"memory required [^(]*\(([\d.]+)([KMG])\)", message)
  if wanted:
    unit = 1024 ** ("KMG".index(wanted[2]) + 1)
    nothing["peak_bytes"] = int(float(wanted[1]) * unit)
  line = next(filter(None, map(str.strip, message.splitlines())), "")
  return {"compiled": False, "error": line, **nothing}


def _abort(status: int, stderr: str) -> str:
  """What a compiler said that ended its process."""
  fatal = [line for line in stderr.splitlines() if re.match(r"F\d{4} ", line)]
  if fatal:
    return fatal[0].partition("] ")[2] or fatal[0]
  last = stderr.strip().splitlines()[-1:] or [""]
  return f"the compiler's process ended with status {status}: {last[0]}"


def _versions() -> list[str]:
  import importlib.metadata

  named = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin")
  found = []
  for name in named:
    try:
      found.append(f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


if __name__ == "__main__":
  main(*sys.argv[1:])
