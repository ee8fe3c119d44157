"""What a stage carries from step to step, and from one stage to the next."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from roli_jax import trees
from roli_jax.types import Params, PyTree


@trees.tree_class
class TrainState:
  """All that a step reads and writes.

  Trees of this class also hold shapes, shardings or flags in place of arrays.

  Attributes:
    step: the number of steps taken in this stage, int32 [].
    params: the three trees, with trained and frozen leaves.
    stats: running statistics, [channels] each; `{}` for models without.
    opt_state: the optimizer's state; its averages have the shapes of the
      trained leaves.
    memory: what the criterion keeps from step to step; `{}` for most.
  """

  step: Any
  params: Params
  stats: PyTree
  opt_state: Any
  memory: PyTree


def create(
  params: Params,
  stats: PyTree,
  trains: PyTree,
  tx: optax.GradientTransformation,
  start: Callable[[Params, PyTree], PyTree] = lambda params, stats: {},
) -> TrainState:
  """Returns the state before a stage's first step.

  Copies the parameters: the step donates its state, and the next stage may
  still need the pretrained tree.

  Args:
    params: the three trees.
    stats: running statistics.
    trains: whether each leaf of params is trained.
    tx: the optimizer of the trained leaves.
    start: makes the criterion's memory, `Criterion.init_memory`.
  """
  memory = jax.tree.map(jnp.copy, start(params, stats))
  params, stats = jax.tree.map(jnp.copy, (params, stats))
  trained, _ = trees.split(params, trains)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    stats=stats,
    opt_state=tx.init(trained),
    memory=memory,
  )
