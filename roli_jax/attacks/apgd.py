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

from roli_jax import losses, projections, trees
from roli_jax.attacks import search
from roli_jax.attacks.search import Classify, Job
from roli_jax.keys import fold
from roli_jax.threat import TINY, per_image
from roli_jax.types import Array, Float, Images, Keys, Labels, Logits, LogitsFn

RHO = 0.75  # the share of rising steps that keeps the step size
MOMENTUM = 0.75
L1_SHRINK = 1.5  # of the step size, while the change stays as sparse


@trees.tree_class
class ApgdState(search.State):
  """Attributes beyond a search's:

  x: the iterate, which the next step evaluates.
  previous: the one before it.
  best: the iterate of the highest value, with its gradient.
  step_size: in the norm of the threat model.
  rises: steps since the last check point that raised the value.
  last: the value before.
  halved: whether the last check point halved the step size.
  checked: the best value at the last check point.
  share: of the values that an L1 step moves.
  changed: values of the best iterate that differ from the clean image.
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
class Apgd(search.Search):
  """APGD as AutoAttack runs it, in its own details too.

  The history of losses that decides on the step size begins with a zero in
  place of the start's; after a return to the best iterate the momentum still
  comes from the last one. Both are as in the official code, whose numbers are
  the standard. A job ends at the first misclassified iterate, not after all
  steps: who is robust does not depend on it.

  In L1 the radius shrinks over three stages (3, 2 and 1 times eps, for 30, 30
  and 40% of the steps), each from the best iterate of the one before; what
  counts is the last. There is no momentum, and a step moves as many values as
  the best iterate's change suggests.

  Attributes:
    num_steps: of a job; one more point is evaluated (in L1 one more a stage).
    loss: what is climbed, `ce`, `dlr` or `margin`; towards the target, where
      there are targets. DLR needs three classes, or four towards a target;
      with fewer it is the margin.
    random_start: whether it starts at a random image of the ball, as AutoAttack
      does, or at the clean one.
    radii: of the stages in L1, in units of eps.
  """

  num_steps: int = search.static(100)
  loss: str = search.static("ce")
  random_start: bool = search.static(True)
  radii: tuple[float, ...] = search.static((3.0, 2.0, 1.0))

  def __post_init__(self):
    super().__post_init__()
    if self.num_steps < len(self.radii):
      raise ValueError(
        f"num_steps must be >= {len(self.radii)}, got {self.num_steps}"
      )
    if self.loss not in losses.TOWARDS:
      raise ValueError(
        f"unknown loss {self.loss!r}; there are {sorted(losses.TOWARDS)}"
      )

  @property
  def name(self) -> str:
    """`apgd_ce`, `apgd_dlr`; towards targets `apgd_t`, with DLR's loss."""
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
    """Each image's point of highest loss, of the loss that it has."""
    del surrogate  # it starts at a random image and can't raise KL
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    return ApgdMaxLoss(**fields | {"stop": False})

  def notes(self, num_classes: int) -> list[str]:
    needed = 4 if self.num_targets else 3
    substitutes = []
    if self.loss == "dlr" and num_classes < needed:
      substitutes = [
        f"{self.name}: the margin in place of DLR, which needs {needed} classes"
      ]
    return super().notes(num_classes) + substitutes

  def begin(self, job: Job) -> ApgdState:
    x = self._start(job)
    zeros = jnp.zeros(len(x), x.dtype)
    low = jnp.full(len(x), -jnp.inf, x.dtype)
    # The official history starts with a zero: all cross-entropies are above.
    last = low if self.loss == "ce" and not self.num_targets else zeros
    return ApgdState(
      i=jnp.zeros(len(x), jnp.int32),
      adv=job.images,
      found=jnp.zeros(len(x), bool),
      done=jnp.zeros(len(x), bool),
      merit=low,
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
    noise = search.noise(job, threat.norm)
    if threat.norm == "l1":
      widest = dataclasses.replace(threat, eps=job.eps * self.radii[0])
      return widest.project(x + noise, x)
    length = threat.distance(noise, jnp.zeros_like(noise))
    ratio = job.eps / (length + TINY)
    return jnp.clip(x + per_image(ratio, x) * noise, threat.low, threat.high)

  def step(self, classify: Classify, job: Job, state: ApgdState) -> ApgdState:
    def climb(logits):
      if self.num_targets:
        return losses.TOWARDS[self.loss](logits, job.labels, job.targets)
      return losses.SURROGATES[self.loss].climb(logits, job.labels)

    draws = fold(job.keys, state.i)
    value, grads, wrong = search.ascent(
      climb, classify, state.x, job.labels, draws, self.eot
    )
    value = value.astype(state.x.dtype)
    if self.threat.norm == "l1":
      state = self._step_l1(job, state, value, grads, wrong)
    else:
      state = self._step(job, state, value, grads, wrong)
    i = state.i + 1
    return dataclasses.replace(
      state,
      i=i,
      done=(state.found & self.stop) | (i >= self.length),
      merit=jnp.where(state.found, jnp.inf, state.best_value),
    )

  def pick(self, job: Job, state: ApgdState) -> Images:
    del job
    found = search.at_pixels(state.found, state.x)
    return jnp.where(found, state.adv, state.best)

  def _step(self, job, state, value, grads, wrong):
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
    at = search.at_pixels(halves, state.x)
    x = jnp.where(at, state.best, state.x)
    grads = jnp.where(at, state.best_grads, grads)

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

  def _step_l1(self, job, state, value, grads, wrong):
    radii, firsts, lasts, checks = (
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
    at = search.at_pixels(checks & sparser, state.x)
    x = jnp.where(at, state.best, state.x)
    grads = jnp.where(at, state.best_grads, grads)

    ways = _sparse_signs(grads, share)
    moved = x + per_image(size, x) * ways
    # After a stage's last point: the best one, brought into the next ball.
    moved = jnp.where(search.at_pixels(lasts, x), state.best, moved)
    following = dataclasses.replace(
      self.threat, eps=jnp.where(lasts, self._after(job, radii), radius)
    )
    return dataclasses.replace(
      state,
      x=following.project(moved, job.images),
      step_size=size,
      share=share,
      changed=jnp.where(checks, changed, state.changed),
    )

  def _after(self, job, radii):
    """The radius of the stage after the one of each job."""
    after = job.eps * self.radii[-1]
    for now, following in zip(self.radii, self.radii[1:], strict=False):
      after = jnp.where(radii == now, job.eps * following, after)
    return after


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ApgdMaxLoss(Apgd):
  """APGD as training wants it: each image's point of highest loss.

  Also of images that are misclassified as they are, and after all steps. In L1
  the point is of the last stage, whose ball is the threat model's. One call
  makes one job of each image.
  """

  stop: bool = search.static(False)
  is_search: ClassVar[bool] = False
  is_long: ClassVar[bool] = False

  def __post_init__(self):
    super().__post_init__()
    if self.num_targets or self.num_restarts > 1:
      raise ValueError(
        "training climbs one loss from one start: no targets, num_restarts=1"
      )

  def for_training(self, surrogate: str) -> "ApgdMaxLoss":
    """Itself."""
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
    eps = jnp.asarray(self.threat.eps, images.dtype)
    job = search.Job(
      images=images,
      labels=labels,
      targets=labels,
      restart=jnp.zeros(len(images), jnp.int32),
      eps=jnp.broadcast_to(eps, (len(images),)),
      keys=keys,
    )
    classify = search.keyed(logits_fn, stochastic)
    state, _ = search.proceed(self, classify, job, self.begin(job), self.length)
    return state.best


def _seen(state, value, grads, wrong):
  """The state after the iterate's evaluation."""
  wins = value > state.best_value
  at = search.at_pixels(wins, state.x)
  hit = search.at_pixels(wrong, state.x)
  return dataclasses.replace(
    state,
    adv=jnp.where(hit, state.x, state.adv),
    found=state.found | wrong,
    best=jnp.where(at, state.x, state.best),
    best_grads=jnp.where(at, grads, state.best_grads),
    best_value=jnp.where(wins, value, state.best_value),
  )


def _windows(num_steps: int) -> np.ndarray:
  """After each number of steps, the check point's window, or 0 for none."""
  window = max(int(0.22 * num_steps), 1)
  least = max(int(0.06 * num_steps), 1)
  shorter = max(int(0.03 * num_steps), 1)
  table = np.zeros(num_steps + 1, np.int32)
  at = window
  while at <= num_steps:
    table[at] = window
    window = max(window - shorter, least)
    at += window
  return table


def _stages(
  num_steps: int, radii: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """The stages of APGD in L1, by its points.

  Returns:
    For each point its radius in units of eps; whether it is the first of its
    stage; whether it is the last of a stage that another one follows; whether
    the step size is looked at after it.
  """
  early = -(-3 * num_steps // 10)
  lengths = [early] * (len(radii) - 1)
  lengths.append(num_steps - sum(lengths))
  table = [
    (radius, j == 0, j == length and k < len(radii) - 1,
     j % max(int(0.04 * length), 1) == 0)
    for k, (radius, length) in enumerate(zip(radii, lengths, strict=True))
    for j in range(length + 1)
  ]  # fmt: skip
  radius, first, last, checks = map(np.array, zip(*table, strict=True))
  return radius.astype(np.float32), first, last, checks


def _changed(images, origin):
  """How many values of each image differ from the clean one's."""
  return (images != origin).reshape(len(images), -1).sum(1).astype(images.dtype)


def _sparse_signs(grads: Images, share: Float[Array, "b"]) -> Images:
  """Signs of each image's largest gradients, of unit L1 norm in all."""
  flat = grads.reshape(len(grads), -1)
  lengths = jnp.abs(flat)
  values = flat.shape[1]
  at = jnp.clip((1 - share) * values, 0, values - 1).astype(jnp.int32)
  least = projections.order_statistic(lengths, at[:, None])
  kept = jnp.where(lengths >= least, jnp.sign(flat), 0)
  size = jnp.abs(kept).sum(1, keepdims=True)
  return (kept / (size + 1e-10)).reshape(grads.shape)
