"""Learning rates and radii by step, as shares of their largest values."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from roli_jax import specs
from roli_jax.types import Array, Float, Int

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


def warmup(
  num_steps: int,
  warmup: float,
  decay: str,
  *,
  every: int = 1,
  starts_at_zero: bool = False,
) -> Schedule:
  """Rises linearly to 1, then falls to 0 at `num_steps`, or stays.

  With w steps of warm-up the first step is at 1 / w already, and step w - 1 is
  the first at the peak: a step at rate 0 would be wasted.

  Args:
    num_steps: the number of steps of the whole stage, >= 1.
    warmup: the share of them that rises, in [0, 1]; 0 starts at the peak.
    decay: `cosine`, `linear` or `constant`.
    every: how many steps in a row share a rate, >= 1: those of an epoch, in the
      RoLI reference. The last such group may be shorter.
    starts_at_zero: the first step has rate 0, and step w the peak rate.
  """
  if not 0 <= warmup <= 1:
    raise ValueError(f"warmup is a share in [0, 1], got {warmup}")
  num_rates = -(-num_steps // every)
  warmup_steps = round(warmup * num_rates)
  after = max(num_rates - warmup_steps, 1)
  decays = {
    "cosine": optax.cosine_decay_schedule(1.0, after),
    "linear": optax.linear_schedule(1.0, 0.0, after),
    "constant": optax.constant_schedule(1.0),
  }
  fall = specs.lookup(decays, decay, "decay")
  rise = optax.linear_schedule(
    1 / max(warmup_steps, 1), 1.0, max(warmup_steps - 1, 1)
  )
  if starts_at_zero:
    rise = optax.linear_schedule(0.0, 1.0, max(warmup_steps, 1))
  by_rate = optax.join_schedules([rise, fall], [warmup_steps])
  return by_rate if every == 1 else lambda step: by_rate(step // every)


def ramp(num_steps: int, begin: float = 0.0, end: float = 0.0) -> Schedule:
  """0 until `begin`, linear to 1 at `end`, and 1 from there on.

  Scales the radius of the training attack (Epsilon-Scheduling, 2509.23325).

  Args:
    num_steps: the number of steps of the whole stage, >= 1.
    begin: the share of the stage where the ramp begins, in [0, 1].
    end: the share of the stage where the ramp ends, at least `begin`; 0 is the
      constant schedule.
  """
  if not 0 <= begin <= end <= 1:
    raise ValueError(
      f"expected 0 <= begin <= end <= 1, got {begin=} and {end=}"
    )
  if not end:
    return optax.constant_schedule(1.0)
  first, last = begin * num_steps, end * num_steps
  return lambda step: jnp.clip((step - first) / max(last - first, 1), 0.0, 1.0)
