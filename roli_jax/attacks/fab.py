"""FAB: the nearest misclassified image, by steps along linearised boundaries.

Croce and Hein 2020, "Minimally distorted adversarial examples with a fast
adaptive boundary attack", algorithm 1.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from roli_jax import losses, projections, trees
from roli_jax.attacks import base, search
from roli_jax.attacks.search import Classify, Job
from roli_jax.keys import fold
from roli_jax.threat import TINY, near_one, per_image
from roli_jax.types import Array, Bool, Images

BIAS = 0.1  # the most that a step is drawn towards the clean image (alpha_max)
OVERSHOOT = 1.05  # of the step across the boundary (eta)
BACK = 0.9  # of the offset, kept after the boundary was crossed (beta)


@trees.tree_class
class FabState(search.State):
  """Attributes beyond a search's:

  x: the iterate.
  distance: of `adv` from the clean image, inf where there is none.
  """

  x: Any
  distance: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fab(search.Search):
  """FAB, towards target classes (FAB-T) or the nearest boundary of any.

  The radius plays no part in where it goes: it counts as a break where the
  distance is at most eps, and the least distance is a result of its own.
  Restarts but the first begin at a random point of radius eps / 2.

  Attributes:
    num_steps: of a job.
    stop: whether a job ends once it is within eps. By default it does not, and
      the distance is the least of all steps.
    reach: a job ends at once whose linearised boundary is further than so many
      times eps; `inf` lets none end.
  """

  stop: bool = search.static(False)
  num_steps: int = search.static(100)
  reach: float = search.static(float("inf"))
  finds_distance: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    if self.num_steps < 1:
      raise ValueError(f"num_steps must be >= 1, got {self.num_steps}")
    if self.eot > 1:
      raise ValueError("FAB has no expectation over transformation: eot is 1")

  @property
  def name(self) -> str:
    return "fab_t" if self.num_targets else "fab"

  @property
  def length(self) -> int:
    return self.num_steps

  @property
  def step_passes(self) -> tuple[int, int]:
    """Untargeted, backward passes are one for each class: counted as one."""
    return 2, 1

  def begin(self, job: Job) -> FabState:
    x = jnp.asarray(job.images)
    none = jnp.full(len(x), jnp.inf, x.dtype)
    return FabState(
      i=jnp.zeros(len(x), jnp.int32),
      adv=x,
      found=jnp.zeros(len(x), bool),
      done=jnp.zeros(len(x), bool),
      merit=-none,
      x=self._start(job),
      distance=none,
    )

  def _start(self, job: Job) -> Images:
    x, threat = jnp.asarray(job.images), self.within(job)
    noise = search.noise(job, threat.norm)
    length = threat.distance(noise, jnp.zeros_like(noise))
    ratio = job.eps / 2 / (length + TINY)
    ratio = jnp.where(job.restart == 0, 0, ratio)
    return jnp.clip(x + per_image(ratio, x) * noise, threat.low, threat.high)

  def retract(self, state: FabState, rows: Bool[Array, "b"]) -> FabState:
    state = super().retract(state, rows)
    distance = jnp.where(rows, jnp.inf, state.distance)
    return dataclasses.replace(state, distance=distance)

  def step(self, classify: Classify, job: Job, state: FabState) -> FabState:
    threat, x0 = self.within(job), jnp.asarray(job.images)
    draws = fold(job.keys, state.i)
    if self.num_targets:
      gap, normal = _towards(classify, job, state.x, draws)
    else:
      gap, normal = _nearest(classify, job, state.x, draws, threat.norm)
    b = len(x0)
    flat = normal.reshape(b, -1)
    points = jnp.concatenate([state.x, x0]).reshape(2 * b, -1)
    level = (flat * state.x.reshape(b, -1)).sum(1) - gap
    ways = projections.onto_hyperplane(
      threat.norm,
      points,
      jnp.tile(flat, (2, 1)),
      jnp.tile(level, 2)[:, None],
      threat.low,
      threat.high,
    ).reshape(2, *x0.shape)
    zeros = jnp.zeros_like(x0)
    lengths = [jnp.maximum(threat.distance(d, zeros), 1e-8) for d in ways]
    bias = per_image(jnp.clip(lengths[0] / sum(lengths), 0, BIAS), x0)
    x = (state.x + OVERSHOOT * ways[0]) * (1 - bias)
    x = jnp.clip(x + (x0 + OVERSHOOT * ways[1]) * bias, threat.low, threat.high)

    wrong = ~losses.correct(classify(x, draws), job.labels)
    distance = threat.distance(x, x0)
    nearer = wrong & (distance < state.distance)
    best = jnp.where(nearer, distance, state.distance)
    crossed = search.at_pixels(wrong, x)
    too_far = (state.i == 0) & (lengths[0] > self.reach * job.eps)
    i, found = state.i + 1, (state.found | wrong) & ~too_far
    return dataclasses.replace(
      state,
      i=i,
      x=jnp.where(crossed, x0 + BACK * (x - x0), x),
      adv=jnp.where(search.at_pixels(nearer, x), x, state.adv),
      distance=best,
      found=found,
      done=(self.stop & (best <= job.eps)) | (i >= self.length) | too_far,
      merit=-best,
    )

  def pick(self, job: Job, state: FabState) -> Images:
    inside = search.at_pixels(state.distance <= job.eps, state.x)
    return jnp.where(inside, state.adv, job.images)


def _towards(classify, job, x, draws):
  """The target's logit minus the label's, and its gradient."""

  def value(x):
    gap = losses.margin_towards(classify(x, draws), job.labels, job.targets)
    return gap.sum(), gap

  normal, gap = jax.grad(value, has_aux=True)(x)
  normal, gap = near_one(base.finite(normal), gap)
  return gap, normal


def _nearest(classify, job, x, draws, norm):
  """The same for the class whose linearised boundary is nearest.

  One class after the other, so that memory does not grow with their number.
  """
  logits, pull = jax.vjp(lambda x: classify(x, draws), x)
  own = jax.nn.one_hot(job.labels, logits.shape[1], dtype=logits.dtype)
  own_logit = losses.own(logits, job.labels)

  def look(k, carry):
    nearest, gap, normal = carry
    one_hot = jax.nn.one_hot(k, logits.shape[1], dtype=logits.dtype)
    towards = one_hot.reshape(1, -1) - own
    own_normal, own_gap = near_one(
      base.finite(pull(towards)[0]), logits[:, k] - own_logit
    )
    flat = own_normal.reshape(len(x), -1)
    dual = {
      "linf": lambda: jnp.abs(flat).sum(1),
      "l2": lambda: jnp.sqrt(jnp.square(flat).sum(1)),
      "l1": lambda: jnp.abs(flat).max(1),
    }[norm]()
    distance = jnp.abs(own_gap) / (dual + TINY)
    distance = jnp.where(k == job.labels, jnp.inf, distance)
    wins = distance < nearest
    return (
      jnp.where(wins, distance, nearest),
      jnp.where(wins, own_gap, gap),
      jnp.where(search.at_pixels(wins, x), own_normal, normal),
    )

  far = jnp.full(len(x), jnp.inf, x.dtype)
  none = (far, jnp.zeros_like(far), jnp.zeros_like(x))
  return jax.lax.fori_loop(0, logits.shape[1], look, none)[1:]
