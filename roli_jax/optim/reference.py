"""The AdamW of RoLI's reference code, which differs from Loshchilov's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class _State(NamedTuple):
  count: Any
  mu: Any
  nu: Any


def adamw(
  learning_rate: Callable[[Any], Any],
  decay: Callable[[Any], Any],
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
    learning_rate: a function of the number of steps before, int32.
    decay: which of these parameters decay: a tree of bools.
    weight_decay: >= 0.
    b1: of the first moment.
    b2: of the second.
    eps: see above.
  """

  def init(params):
    # Arrays of their own: a step donates its state.
    mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
    return _State(jnp.zeros((), jnp.int32), mu, nu)

  def update(grads, state, params):
    rate = learning_rate(state.count)
    t = state.count + 1
    mu = optax.tree.update_moment(grads, state.mu, b1, 1)
    nu = optax.tree.update_moment(grads, state.nu, b2, 2)
    scale = rate * jnp.sqrt(1 - b2**t) / (1 - b1**t)

    def step(m, v, w, decays):
      moved = w - scale * m / (jnp.sqrt(v) + eps)
      moved = moved * (1 - rate * weight_decay * decays)
      return (moved - w).astype(w.dtype)

    updates = jax.tree.map(step, mu, nu, params, decay(params))
    return updates, _State(t, mu, nu)

  return optax.GradientTransformation(init, update)
