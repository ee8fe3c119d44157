"""APGD: ascent with momentum whose step size the loss itself decides.

Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an
ensemble of diverse parameter-free attacks", algorithm 1; for L1 Croce and Hein
2021, "Mind the box", algorithm 1.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import losses, projections, specs, trees
from roli_jax.attacks import base, jobs, search
from roli_jax.attacks.jobs import Job
from roli_jax.attacks.search import Ascent, Classify
from roli_jax.keys import fold
from roli_jax.threat import per_image
from roli_jax.types import (
  Array,
  Bool,
  Float,
  Images,
  Keys,
  Labels,
  Logits,
  LogitsFn,
)

RHO = 0.75  # the share of rising steps that keeps the step size (rho)
MOMENTUM = 0.75  # the weight of the new step against the last one (alpha)
L1_SHRINK = 1.5  # divides the step size while the change stays as sparse


@trees.tree_class
class ApgdState(jobs.State):
  """The state of b jobs of APGD.

  Attributes:
    x: float [b, *image], the iterate, which the next step evaluates.
    previous: float [b, *image], the iterate before it.
    best: float [b, *image], the iterate of the highest value.
    best_grads: float [b, *image], its gradient.
    best_value: float [b], its value; -inf before the first evaluation.
    step_size: float [b], in the norm of the threat model.
    rises: int32 [b], steps since the last check point that raised the value.
    last: float [b], the value of the iterate before.
    halved: bool [b], whether the last check point halved the step size.
    checked: float [b], the best value at the last check point.
    share: float [b], the share of an image's values that an L1 step moves.
    changed: float [b], how many values of the best iterate differ from the
      clean image, at the last check point in L1.
  """

  x: Any
  previous: Any
  best: Any
  best_grads: Any
  best_value: Any
  step_size: Any
  rises: Any
  last: Any
  halved: Any
  checked: Any
  share: Any
  changed: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Apgd(search.Search[ApgdState]):
  """APGD as AutoAttack runs it, with two details of the official code.

  The history of losses that decides on the step size begins with a zero in
  place of the loss at the start. After a return to the best iterate the
  momentum still comes from the last one. Both are kept, since the official
  numbers are the standard. Other than there, a job ends at the first
  misclassified iterate; which images are robust does not depend on it.

  In L1 the radius shrinks over three stages (3, 2 and 1 times eps, for 30, 30
  and 40% of the steps). Each starts at the best iterate of the stage before,
  and only the last one can break an image. There is no momentum, and a step
  moves fewer values as the best iterate's change becomes sparser.

  Attributes:
    num_steps: steps of a job, >= the number of radii; 100 by default. One more
      point is evaluated (in L1 one more in each stage).
    loss: the loss that is climbed, `ce`, `dlr` or `margin`; with targets its
      targeted form. DLR needs three classes, or four towards a target; with
      fewer the margin takes its place.
    random_start: whether it starts at a random image of the ball, as AutoAttack
      does, or at the clean one.
    radii: the radii of the stages in L1, in units of eps, the last one 1.
  """

  num_steps: int = base.static(100)
  loss: str = base.static("ce")
  random_start: bool = base.static(True)
  radii: tuple[float, ...] = base.static((3.0, 2.0, 1.0))

  def __post_init__(self):
    super().__post_init__()
    if self.num_steps < len(self.radii):
      raise ValueError(
        f"num_steps must be >= {len(self.radii)}, got {self.num_steps}"
      )
    specs.lookup(losses.TOWARDS, self.loss, "loss")

  @property
  def name(self) -> str:
    """`apgd_<loss>`; towards targets `apgd_t` for DLR, else `apgd_t_<loss>`."""
    if not self.num_targets:
      return f"apgd_{self.loss}"
    return "apgd_t" if self.loss == "dlr" else f"apgd_t_{self.loss}"

  @property
  def length(self) -> int:
    stages = len(self.radii) if self.threat.norm == "l1" else 1
    return self.num_steps + stages

  @property
  def step_passes(self) -> tuple[int, int]:
    return self.eot, self.eot

  def for_training(self, surrogate: str) -> "ApgdMaxLoss":
    """Returns APGD on the same loss that keeps each image's highest point."""
    del surrogate  # `losses.TOWARDS` has no KL: it raises the loss it has
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    return ApgdMaxLoss(**fields | {"stop": False})

  def notes(self, num_classes: int) -> list[str]:
    needed = 4 if self.num_targets else 3  # logits that the ratio compares
    substitutes = []
    if self.loss == "dlr" and num_classes < needed:
      substitutes = [
        f"{self.name}: the margin in place of DLR, which needs {needed} classes"
      ]
    return super().notes(num_classes) + substitutes

  def begin(self, job: Job) -> ApgdState:
    x, fresh = self._start(job), jobs.fresh_state(job)
    low = fresh["merit"]
    zeros = jnp.zeros_like(low)
    # The official history starts with a zero: all cross-entropies are above.
    aims = self.num_targets or self.targeted
    last = low if self.loss == "ce" and not aims else zeros
    return ApgdState(
      **fresh,
      x=x,
      previous=x,
      best=x,
      best_grads=jnp.zeros_like(x),
      best_value=low,
      step_size=2 * job.eps.astype(x.dtype),
      rises=jnp.zeros(len(x), jnp.int32),
      last=last,
      halved=jnp.ones(len(x), bool),
      checked=low,
      share=zeros,
      changed=zeros,
    )

  def _start(self, job: Job) -> Images:
    x, threat = jnp.asarray(job.images), self.within(job)
    if not self.random_start:
      return x
    if threat.norm == "l1":
      widest = dataclasses.replace(threat, eps=job.eps * self.radii[0])
      return widest.project(x + jobs.noise(job, threat.norm), x)
    return jobs.noisy_start(job, threat, job.eps)

  def step(self, classify: Classify, job: Job, state: ApgdState) -> ApgdState:
    def climb(logits: Logits) -> Float[Array, " b"]:
      if self.num_targets:
        return losses.TOWARDS[self.loss](logits, job.labels, job.targets)
      raised = losses.SURROGATES[self.loss]
      raised = raised.lowered if self.targeted else raised
      return raised.climb(logits, job.labels)

    def succeeds(logits: Logits) -> Bool[Array, " b"]:
      return self.succeeds(logits, job.labels)

    draws = fold(job.keys, state.i)
    value, grads, wrong = search.ascent(
      climb, succeeds, classify, state.x, draws, self.eot
    )
    move = self._step_l1 if self.threat.norm == "l1" else self._step
    here = (value.astype(state.x.dtype), grads, wrong)
    state = move(job, state, here)
    i = state.i + 1
    return dataclasses.replace(
      state,
      i=i,
      done=(state.found & self.stop) | (i >= self.length),
      merit=jnp.where(state.found, jnp.inf, state.best_value),
    )

  def pick(self, job: Job, state: ApgdState) -> Images:
    del job
    return search.where(state.found, state.adv, state.best)

  def _step(self, job: Job, state: ApgdState, here: Ascent) -> ApgdState:
    """Moves in Linf and L2, from the ascent at the iterate."""
    value, grads, wrong = here
    state = _seen(state, value, grads, wrong)
    i, first = state.i, state.i == 0
    checked = jnp.where(first, value, state.checked)
    rises = state.rises + (~first & (value > state.last))
    last = jnp.where(first, state.last, value)

    window = jnp.asarray(_windows(self.num_steps))[i]
    few = rises <= RHO * window
    stuck = ~state.halved & (checked >= state.best_value)
    halves = (window > 0) & (few | stuck)
    step_size = jnp.where(halves, state.step_size / 2, state.step_size)
    x, grads = search.where(
      halves, (state.best, state.best_grads), (state.x, grads)
    )

    threat = self.within(job)
    size = per_image(step_size, x)
    ahead = threat.project(x + size * threat.steepest(grads, x), job.images)
    a = per_image(jnp.where(first, 1.0, MOMENTUM).astype(x.dtype), x)
    moved = x + a * (ahead - x) + (1 - a) * (x - state.previous)
    return dataclasses.replace(
      state,
      x=threat.project(moved, job.images),
      previous=x,
      step_size=step_size,
      rises=jnp.where(window > 0, 0, rises),
      last=last,
      halved=jnp.where(window > 0, halves, state.halved),
      checked=jnp.where(window > 0, state.best_value, checked),
    )

  def _step_l1(self, job: Job, state: ApgdState, here: Ascent) -> ApgdState:
    """Moves in L1, from the ascent at the iterate."""
    value, grads, wrong = here
    radii, next_radii, firsts, lasts, checks = (
      jnp.asarray(table)[state.i]
      for table in _stages(self.num_steps, self.radii)
    )
    is_final_stage = radii == self.radii[-1]
    state = dataclasses.replace(
      state, best_value=jnp.where(firsts, -jnp.inf, state.best_value)
    )
    state = _seen(state, value, grads, wrong & is_final_stage)
    radius = job.eps * radii.astype(value.dtype)

    changed = _changed(state.best, job.images)
    sparser = ~firsts & (changed < 0.95 * state.changed)
    size = state.step_size / L1_SHRINK
    size = jnp.where(firsts | sparser, radius, size)
    size = jnp.clip(size, radius / 10, radius)
    size = jnp.where(checks, size, state.step_size)
    values = int(np.prod(state.x.shape[1:]))
    share = jnp.where(checks, changed / values / 1.5, state.share)
    x, grads = search.where(
      checks & sparser, (state.best, state.best_grads), (state.x, grads)
    )

    moved = x + per_image(size, x) * _sparse_signs(grads, share)
    # After a stage's last point: the best one, brought into the next ball.
    moved = search.where(lasts, state.best, moved)
    following = dataclasses.replace(
      self.threat, eps=job.eps * next_radii.astype(value.dtype)
    )
    return dataclasses.replace(
      state,
      x=following.project(moved, job.images),
      step_size=size,
      share=share,
      changed=jnp.where(checks, changed, state.changed),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ApgdMaxLoss(Apgd):
  """APGD for training, which returns each image's point of highest loss.

  It takes all steps, also of images that are misclassified as they are. In L1
  the point is the best one of the last stage, whose ball is the threat model's.
  One call runs one job of each image.
  """

  stop: bool = base.static(False)
  is_search: ClassVar[bool] = False
  is_long: ClassVar[bool] = False

  def __post_init__(self):
    super().__post_init__()
    if self.num_targets or self.num_restarts > 1:
      raise ValueError(
        "training climbs one loss from one start: no targets, num_restarts=1"
      )

  def for_training(self, surrogate: str) -> "ApgdMaxLoss":
    """Returns this attack."""
    del surrogate
    return self

  def __call__(
    self,
    logits_fn: LogitsFn,
    images: Images,
    labels: Labels | Logits,
    keys: Keys,
    *,
    stochastic: bool = False,
  ) -> Images:
    job = jobs.make_job(self.threat, images, labels, keys)
    classify = search.keyed(logits_fn, stochastic)
    state, _ = search.proceed(self, classify, job, self.begin(job), self.length)
    return state.best


def _seen(
  state: ApgdState,
  value: Float[Array, " b"],
  grads: Images,
  wrong: Bool[Array, " b"],
) -> ApgdState:
  """Enters the iterate's value, gradient and verdict into the state."""
  best, best_grads, best_value = search.where(
    value > state.best_value,
    (state.x, grads, value),
    (state.best, state.best_grads, state.best_value),
  )
  return dataclasses.replace(
    state,
    adv=search.where(wrong, state.x, state.adv),
    found=state.found | wrong,
    best=best,
    best_grads=best_grads,
    best_value=best_value,
  )


def _windows(num_steps: int) -> np.ndarray:
  """Returns the check point's window after 0, ..., num_steps steps, 0 for none.

  The shares 0.22, 0.06 and 0.03 of the steps are those of the paper.
  """
  window = max(int(0.22 * num_steps), 1)
  least = max(int(0.06 * num_steps), 1)
  shorter = max(int(0.03 * num_steps), 1)
  table = np.zeros(num_steps + 1, np.int32)
  steps = window
  while steps <= num_steps:
    table[steps] = window
    window = max(window - shorter, least)
    steps += window
  return table


def _stages(
  num_steps: int, radii: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Lays out the stages of APGD in L1 over the points that it evaluates.

  Returns:
    Arrays of one value a point: its radius, and that of the next point, float32
    in units of eps; whether it is the first of its stage; whether it is the
    last of a stage that another one follows; whether it is a check point, after
    which the step size is decided. All but the last stage take 30% of the steps
    each, rounded up.
  """
  early = -(-3 * num_steps // 10)
  lengths = [early] * (len(radii) - 1)
  lengths.append(num_steps - sum(lengths))
  stages = []
  for k, (radius, length) in enumerate(zip(radii, lengths, strict=True)):
    points = np.arange(length + 1)
    last = (points == length) & (k < len(radii) - 1)
    after = radii[min(k + 1, len(radii) - 1)]
    stages.append(
      (
        np.full(len(points), radius, np.float32),
        np.where(last, after, radius).astype(np.float32),
        points == 0,
        last,
        points % max(int(0.04 * length), 1) == 0,
      )
    )
  radius_of, next_radius_of, firsts, lasts, checks = map(
    np.concatenate, zip(*stages, strict=True)
  )
  return radius_of, next_radius_of, firsts, lasts, checks


def _changed(images: Images, origin: Images) -> Float[Array, " b"]:
  """Counts the values of each image that differ from the clean one's."""
  return (images != origin).reshape(len(images), -1).sum(1).astype(images.dtype)


def _sparse_signs(grads: Images, share: Float[Array, " b"]) -> Images:
  """Returns the signs of each image's largest gradients, of unit L1 norm.

  Args:
    grads: the gradients.
    share: the share of an image's values that are not 0, in [0, 1].
  """
  flat = grads.reshape(len(grads), -1)
  lengths = jnp.abs(flat)
  values = flat.shape[1]
  at = jnp.clip((1 - share) * values, 0, values - 1).astype(jnp.int32)
  least = projections.order_statistic(lengths, at[:, None])
  kept = jnp.where(lengths >= least, jnp.sign(flat), 0)
  size = jnp.abs(kept).sum(1, keepdims=True)
  return (kept / (size + 1e-10)).reshape(grads.shape)
