"""Times of calls: compiled before, blocked on, medians and paired ratios."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Row = dict[str, Any]


def row(suite: str, name: str, seconds: float, **more: Any) -> Row:
  """A row of `bench.jsonl`.

  Args:
    suite: a name in `suites.SUITES`.
    name: what was timed.
    seconds: the time of one call, or of one image.
    **more: further columns, as `bench.run` prints them.
  """
  return {"suite": suite, "name": name, "seconds": seconds, **more}


def turns(
  calls: Mapping[str, Callable[[], Any]], runs: int
) -> dict[str, list[float]]:
  """The seconds of each call, the calls taking turns.

  Each is called once before, so that nothing compiles under the clock. Turns
  let a machine whose speed drifts treat all calls alike.
  """
  for call in calls.values():
    jax.block_until_ready(call())
  times: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(runs):
    for name, call in calls.items():
      started = time.perf_counter()
      jax.block_until_ready(call())
      times[name].append(time.perf_counter() - started)
  return times


def medians(
  calls: Mapping[str, Callable[[], Any]], runs: int
) -> dict[str, float]:
  """The median seconds of each call; see `turns`."""
  times = turns(calls, runs)
  return {name: statistics.median(values) for name, values in times.items()}


def median(call: Callable[[], Any], runs: int) -> float:
  """The median seconds of a call, after one that is not timed."""
  return medians({"": call}, runs)[""]


def ratios(
  times: Sequence[float], others: Sequence[float]
) -> tuple[float, float, float]:
  """Quartiles of the ratios of one call's seconds to another's, turn by turn.

  The middle one is the median. Neighbours in time are compared, so that a drift
  of the machine's speed divides out.

  Args:
    times: a call's seconds in each turn.
    others: those of the other call, in the same turns.
  """
  each = np.divide(times, others)
  low, middle, high = np.quantile(each, (0.25, 0.5, 0.75)).tolist()
  return low, middle, high


def flops(fn: Callable[..., Any], *args: Any) -> float:
  """XLA's count for `fn(*args)`; the body of a loop is counted once only."""
  cost: Any = jax.jit(fn).lower(*args).cost_analysis()
  return float(cost["flops"])


def held_mib(compiled: jax.stages.Compiled) -> float:
  """MiB that a compiled program holds beside its arguments and results."""
  memory: Any = compiled.memory_analysis()
  return memory.temp_size_in_bytes / 2**20


def matmul(runs: int, side: int = 2048) -> tuple[Row, float]:
  """A row of a large square product, and its rate in FLOP/s."""
  seconds = median(product(side), runs)
  rate = 2 * side**3 / seconds
  return row("step", f"matmul {side}", seconds, gflops=rate / 1e9), rate


def product(side: int, dtype: str = "float32") -> Callable[[], Any]:
  """A call that multiplies two square matrices."""
  a = jnp.ones((side, side), dtype)
  matmul = jax.jit(jnp.matmul)
  return lambda: matmul(a, a)
