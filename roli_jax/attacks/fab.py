"""FAB: the nearest misclassified image, by steps along linearised boundaries.

Croce and Hein 2020, "Minimally distorted adversarial examples with a fast
adaptive boundary attack", algorithm 1.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from roli_jax import losses, projections, trees
from roli_jax.attacks import base, jobs, search
from roli_jax.attacks.jobs import Job
from roli_jax.attacks.search import Classify
from roli_jax.keys import fold
from roli_jax.threat import TINY, near_one, per_image
from roli_jax.types import Array, Bool, Float, Images, Keys, Labels, Logits

BIAS = 0.1  # largest weight of the step from the clean image (alpha_max)
OVERSHOOT = 1.05  # factor that carries a step across the boundary (eta)
BACK = 0.9  # share of the offset that is kept after a crossing (beta)
# By as much of two logits' size the judge, another program, may see their
# difference otherwise.
ROUNDING = 1e-5

# The distance of a class's linearised boundary, the gap of logits to it, and
# the gradient of that gap.
_Boundary = tuple[Float[Array, " b"], Float[Array, " b"], Images]


@trees.tree_class
class FabState(jobs.State):
  """The state of b jobs of FAB.

  Attributes:
    x: float [b, *image], the iterate.
    distance: float [b], from the clean image to `adv`, in the norm of the
      threat model; inf where none was found.
    sure: float [b, *image], the nearest image that is misclassified by more
      than rounding, which is left if the judge denies `adv`; None of jobs that
      stop, which go on in that case.
    sure_distance: float [b], its distance.
  """

  x: Any
  distance: Any
  sure: Any = None
  sure_distance: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fab(search.Search[FabState]):
  """FAB, towards target classes (FAB-T) or the nearest boundary of any.

  The radius does not steer the search. An image is broken where its distance is
  at most eps, and the least distance is a result too. All restarts but the
  first begin at a random point at distance eps / 2.

  Attributes:
    num_steps: steps of a job, >= 1; 100 by default.
    stop: whether a job ends once it is within eps. By default it does not, and
      the distance is the least of all steps.
    reach: in units of eps; a job ends after its first step if its linearised
      boundary is further away. `inf`, the default, ends none.
  """

  stop: bool = base.static(False)
  num_steps: int = base.static(100)
  reach: float = base.static(float("inf"))
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
    """Two forward passes and a backward one.

    An untargeted step makes one backward pass for each class; it counts as one.
    """
    return 2, 1

  def begin(self, job: Job) -> FabState:
    radius = jnp.where(job.restart == 0, 0, job.eps / 2)
    fresh = jobs.fresh_state(job)
    far = jnp.full_like(fresh["merit"], jnp.inf)
    start = jobs.noisy_start(job, self.within(job), radius)
    state = FabState(**fresh, x=start, distance=far)
    if self.stop:
      return state
    return dataclasses.replace(state, sure=fresh["adv"], sure_distance=far)

  def has_more(self, state: FabState) -> Bool[Array, " b"]:
    if self.stop:
      return super().has_more(state)
    return jnp.isfinite(state.sure_distance)

  def retract(self, state: FabState, rows: Bool[Array, " b"]) -> FabState:
    if self.stop:
      state = super().retract(state, rows)
      distance = jnp.where(rows, jnp.inf, state.distance)
      return dataclasses.replace(state, distance=distance)
    sure = (state.sure, state.sure_distance)
    adv, distance = search.where(rows, sure, (state.adv, state.distance))
    return dataclasses.replace(
      state,
      adv=adv,
      distance=distance,
      found=state.found & jnp.isfinite(distance),
      sure_distance=jnp.where(rows, jnp.inf, state.sure_distance),
    )

  def step(self, classify: Classify, job: Job, state: FabState) -> FabState:
    threat, x0 = self.within(job), jnp.asarray(job.images)
    draws = fold(job.keys, state.i)
    if self.num_targets or self.targeted:
      gap, normal = self._towards(classify, job, state.x, draws)
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

    logits = classify(x, draws)
    wrong = self.succeeds(logits, job.labels)
    distance = threat.distance(x, x0)
    here = (x, distance)
    nearer = wrong & (distance < state.distance)
    adv, best = search.where(nearer, here, (state.adv, state.distance))
    sure = (state.sure, state.sure_distance)
    if not self.stop:
      surely = wrong & _is_sure(logits, job.labels)
      surely &= distance < state.sure_distance
      sure = search.where(surely, here, sure)
    too_far = (state.i == 0) & (lengths[0] > self.reach * job.eps)
    i, found = state.i + 1, (state.found | wrong) & ~too_far
    return dataclasses.replace(
      state,
      i=i,
      x=search.where(wrong, x0 + BACK * (x - x0), x),
      adv=adv,
      distance=best,
      sure=sure[0],
      sure_distance=sure[1],
      found=found,
      done=(self.stop & (best <= job.eps)) | (i >= self.length) | too_far,
      merit=-best,
    )

  def _towards(
    self, classify: Classify, job: Job, x: Images, draws: Keys
  ) -> tuple[Float[Array, " b"], Images]:
    """Returns the target's logit minus the label's, and its gradient in x.

    If it is targeted, minus the best other one. Both are scaled by the same
    power of two for each image, see `near_one`.
    """

    def value(x: Images) -> tuple[Float[Array, ""], Float[Array, " b"]]:
      logits = classify(x, draws)
      if self.targeted:
        gap = -losses.margin(logits, job.labels)
      else:
        gap = losses.margin_towards(logits, job.labels, job.targets)
      return gap.sum(), gap

    normal, gap = jax.grad(value, has_aux=True)(x)
    normal, gap = near_one(base.finite(normal), gap)
    return gap, normal

  def pick(self, job: Job, state: FabState) -> Images:
    return search.where(state.distance <= job.eps, state.adv, job.images)


def _is_sure(logits: Logits, labels: Labels) -> Bool[Array, " b"]:
  """Whether rounding can't have decided on which side of the label they are."""
  gap, label = losses.margin(logits, labels), losses.own(logits, labels)
  return jnp.abs(gap) > ROUNDING * (jnp.abs(label) + jnp.abs(label + gap))


def _nearest(
  classify: Classify, job: Job, x: Images, draws: Keys, norm: str
) -> tuple[Float[Array, " b"], Images]:
  """As `_towards`, for the class whose linearised boundary is nearest.

  It looks at one class after the other, so that memory does not grow with their
  number.
  """
  logits, pull = jax.vjp(lambda x: classify(x, draws), x)
  label = jax.nn.one_hot(job.labels, logits.shape[1], dtype=logits.dtype)
  label_logit = losses.own(logits, job.labels)

  def look(k: jax.Array, nearest: _Boundary) -> _Boundary:
    one_hot = jax.nn.one_hot(k, logits.shape[1], dtype=logits.dtype)
    towards = one_hot.reshape(1, -1) - label
    gap = jnp.subtract(logits[:, k], label_logit)
    normal, gap = near_one(base.finite(pull(towards)[0]), gap)
    flat = normal.reshape(len(x), -1)
    dual = {
      "linf": lambda: jnp.abs(flat).sum(1),
      "l2": lambda: jnp.sqrt(jnp.square(flat).sum(1)),
      "l1": lambda: jnp.abs(flat).max(1),
    }[norm]()
    distance = jnp.abs(gap) / (dual + TINY)
    distance = jnp.where(k == job.labels, jnp.inf, distance)
    return search.where(distance < nearest[0], (distance, gap, normal), nearest)

  far = jnp.full(len(x), jnp.inf, x.dtype)
  none = (far, jnp.zeros_like(far), jnp.zeros_like(x))
  return jax.lax.fori_loop(0, logits.shape[1], look, none)[1:]
