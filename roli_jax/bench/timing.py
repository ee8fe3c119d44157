"""Times of calls: compiled before, blocked on, medians."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def medians(calls: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
  """The median seconds of each call, the calls taking turns.

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
  return {name: statistics.median(values) for name, values in times.items()}


def flops(fn: Callable[..., Any], *args: Any) -> float:
  """XLA's count for one call, without loops: their bodies count once only."""
  cost: Any = jax.jit(fn).lower(*args).cost_analysis()
  return float(cost["flops"])
