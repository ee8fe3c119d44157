"""What a stage carries from step to step, and from one stage to the next."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from roli_jax import trees
from roli_jax.types import Params, PyTree, Variables


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
    average: the trained leaves' exponential moving average (EMA), with None for
      the frozen ones; `{}` without one.
  """

  step: Any
  params: Params
  stats: PyTree
  opt_state: Any
  memory: PyTree
  average: PyTree = dataclasses.field(default_factory=dict)

  @property
  def variables(self) -> Variables:
    """What is validated, saved and tested: the average, if one is kept.

    Running statistics have no average of their own: they are one already.
    """
    params = self.params
    if self.average:
      params = trees.merge(self.average, params)
    return params, self.stats

  def training_on(self, trained: PyTree, average: PyTree) -> "TrainState":
    """Returns the state with these trained leaves and their average."""
    params = trees.merge(trained, self.params)
    return dataclasses.replace(self, params=params, average=average)


def create(
  params: Params,
  stats: PyTree,
  trains: PyTree,
  tx: optax.GradientTransformation,
  start: Callable[[Params, PyTree], PyTree] = lambda params, stats: {},
  averages: bool = False,
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
    averages: whether an average of the trained leaves is kept; by default not.
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
    average=jax.tree.map(jnp.copy, trained) if averages else {},
  )


def averaged(
  state: TrainState, trained: PyTree, decay: float | int
) -> TrainState:
  """Returns the state with the average that follows its step.

  After n steps it keeps min(decay, n / (9 + n)) of itself, so that early
  averages forget where they began, as TensorFlow's do.

  Args:
    state: after the step, with the average from before it.
    trained: the trained leaves after the step.
    decay: in [0, 1).
  """
  kept = jnp.minimum(decay, state.step / (9 + state.step))
  average = optax.incremental_update(trained, state.average, 1 - kept)
  return dataclasses.replace(state, average=average)
