"""The training step beside PyTorch's, in turns."""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from roli_jax import keys, models, peft, state
from roli_jax.bench import eager, passes, timing, workload
from roli_jax.bench.timing import Row, row
from roli_jax.data.source import num_cores


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
  products = {
    "JAX": timing.product(side, dtype),
    "torch": eager.product(side, dtype),
  }
  rate = 0.0
  for name, seconds in timing.medians(products, config["runs"]).items():
    its_rate = 2 * side**3 / seconds
    rate = max(rate, its_rate)
    what = f"matmul {side}, {name}"
    gflops = its_rate / 1e9
    yield row("against_torch", what, seconds, gflops=gflops, threads=threads)
  for name, size, method in itertools.product(
    config["torch_models"], sizes, ("full", "linear")
  ):
    flops, num_passes, calls = _both(name, size, method, options)
    times = timing.turns(calls, config["torch_pairs"])
    for which, values in times.items():
      seconds = statistics.median(values)
      low, ratio, high = timing.ratios(values, times["ours"])
      yield row(
        "against_torch",
        f"{name} {method} PGD-{workload.NUM_STEPS} batch {size}, {which}",
        seconds,
        images_per_s=size / seconds,
        share_of_floor=flops / rate / seconds,
        times_ours=ratio,
        quartiles=(low, high),
        passes=num_passes,
        pairs=config["torch_pairs"],
        threads=threads,
      )


def _both(
  name: str, size: int, method_name: str, options: Mapping[str, Any]
) -> tuple[float, int, dict[str, Callable[[], Any]]]:
  """A step's FLOPs, its passes, and calls of it: ours, and PyTorch's."""
  model, method = models.create(name, 10), peft.METHODS[method_name]()
  batch = workload.random_batch(model, size)
  train_step, now = workload.build_step(
    models.with_options(model, **options), method
  )
  flops = passes.count_flops(model, method, now, batch)
  forward, backward = workload.attack().passes
  expected = (forward + 1, backward + 1)  # and those of the update
  net = eager.like(model, now.params)
  calls: dict[str, Callable[[], Any]] = {
    "ours": _continued(train_step, now, batch)
  }
  num_steps = workload.NUM_STEPS
  for form, frozen in eager.FORMS.items():
    call = eager.make_step(
      net, method_name, batch, workload.EPS, num_steps, frozen
    )
    found = eager.passes(net, call)
    assert found == expected, f"torch makes {found} passes, we make {expected}"
    calls[f"torch, {form}"] = call
  return flops, sum(expected), calls


def _continued(
  train_step: workload.TrainStep, now: state.TrainState, batch: workload.Batch
) -> Callable[[], Any]:
  """A call that takes the next step each time; the state is donated."""
  jitted = jax.jit(train_step, donate_argnums=0)
  placed, key = jax.device_put((batch, keys.root(0)))

  def call() -> Any:
    nonlocal now
    now, counts = jitted(now, placed, key)
    return now, counts

  return call
