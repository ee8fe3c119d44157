"""The AdamW of RoLI's reference code, which differs from Loshchilov's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from roli_jax.optim.schedules import Schedule
from roli_jax.types import PyTree


class _State(NamedTuple):
  """The state of `adamw`.

  Attributes:
    count: int32 [], steps taken.
    mu: a tree like the parameters, first moments of the gradient.
    nu: a tree like the parameters, second moments.
  """

  count: Any  # an array; `tuple.count` has another type
  mu: PyTree
  nu: PyTree


def adamw(
  learning_rate: Schedule,
  decay: Callable[[PyTree], PyTree],
  weight_decay: float | int,
  b1: float | int,
  b2: float | int,
  eps: float | int,
) -> optax.GradientTransformation:
  """AdamW with eps in the uncorrected denominator, decayed after the step.

  With m, v the moments at step t = 1, 2, ...:

    w <- w - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)
    w <- w - lr weight_decay w

  eps acts as eps / sqrt(1 - b2^t) does in Adam, 30 times as large at t = 1.

  Args:
    learning_rate: the rate, from the number of steps taken, int32 [].
    decay: from parameters to a tree of bools, which of them decay.
    weight_decay: >= 0.
    b1: the decay rate of the first moment, in [0, 1).
    b2: the decay rate of the second moment, in [0, 1).
    eps: as in the formula, > 0.
  """

  def init(params: PyTree) -> _State:
    # Two calls, so that no buffer is shared: a step donates its state.
    mu, nu = (optax.tree.zeros_like(params) for _ in range(2))
    return _State(jnp.int32(0), mu, nu)

  def update(
    grads: PyTree, state: _State, params: PyTree
  ) -> tuple[PyTree, _State]:
    rate = learning_rate(state.count)
    t = state.count + 1
    mu = optax.tree.update_moment(grads, state.mu, b1, 1)
    nu = optax.tree.update_moment(grads, state.nu, b2, 2)
    scale = rate * jnp.sqrt(1 - b2**t) / (1 - b1**t)

    def step(
      m: jax.Array, v: jax.Array, w: jax.Array, decays: bool
    ) -> jax.Array:
      moved = w - scale * m / (jnp.sqrt(v) + eps)
      moved = moved * (1 - rate * weight_decay * decays)
      return (moved - w).astype(w.dtype)

    updates = jax.tree.map(step, mu, nu, params, decay(params))
    return updates, _State(t, mu, nu)

  return optax.GradientTransformation(init, update)
