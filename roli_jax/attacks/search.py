"""Attacks that search step by step: what they share.

A search is a set of *jobs* for each image, one for each target class and
restart. States hold one row a job, and a step never looks across rows. The
caller may thus stop, pack and resume jobs in any order: the result of an image
does not depend on the others.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import losses
from roli_jax.attacks import base
from roli_jax.attacks.base import where
from roli_jax.attacks.jobs import Job, State, make_job
from roli_jax.keys import fold, per_image, root
from roli_jax.threat import ThreatModel
from roli_jax.types import (
  Array,
  Bool,
  Float,
  Images,
  Int,
  Integer,
  Keys,
  Labels,
  Logits,
)

S = TypeVar("S", bound=State)

# `(images, keys) -> logits`; a deterministic function ignores the keys.
Classify = Callable[[Images, Keys], Logits]

# The best image of all jobs so far, its merit, and whether the search is over.
_BestJob = tuple[Images, Float[Array, " b"], Bool[Array, " b"]]
# The values that are climbed, their gradients, and who succeeds: in a draw 1 or
# 0, over all draws a bool.
_Draw = tuple[Float[Array, " b"], Images, Float[Array, " b"]]
Ascent = tuple[Float[Array, " b"], Images, Bool[Array, " b"]]


@dataclasses.dataclass(frozen=True)
class Search(base.Attack, Generic[S]):
  """An attack that searches; subclasses are frozen dataclasses and pytrees.

  Attributes:
    threat: the ball and the box; data, other radii compile nothing.
    num_restarts: jobs for each target, each from another start, >= 1.
    num_targets: how many classes are aimed at, those of the highest clean
      logits beside the label; 0 aims at none.
    stop: whether an image's search ends as soon as it is misclassified.
    eot: draws of a randomised function over which each step averages its loss
      and gradient, >= 1 (expectation over transformation, Athalye et al. 2018).
    targeted: whether labels are targets: one class for each image, which the
      caller chooses, to reach. (`num_targets` are chosen by their logits, and
      aimed at to leave the label.)
  """

  threat: ThreatModel
  num_restarts: int = base.static(1)
  num_targets: int = base.static(0)
  stop: bool = base.static(True)
  eot: int = base.static(1)
  targeted: bool = base.target_field()
  is_search: ClassVar[bool] = True

  def __post_init__(self):
    for field in ("num_restarts", "eot"):
      if getattr(self, field) < 1:
        raise ValueError(f"{field} must be >= 1, got {getattr(self, field)}")
    if self.num_targets < 0:
      raise ValueError(f"num_targets must be >= 0, got {self.num_targets}")
    if self.targeted and self.num_targets:
      raise ValueError(
        "an attack with num_targets chooses its own: with targeted=True take"
        " apgd_ce, apgd_dlr, fab or square"
      )

  @property
  def length(self) -> int:
    """The number of steps of a job."""
    raise NotImplementedError

  @property
  def step_passes(self) -> tuple[int, int]:
    """Forward and backward passes of one step of a job."""
    raise NotImplementedError

  @property
  def passes(self) -> tuple[int, int]:
    """Forward and backward passes that a robust image costs at most."""
    jobs = max(self.num_targets, 1) * self.num_restarts
    forward, backward = self.step_passes
    return jobs * self.length * forward, jobs * self.length * backward

  def targets(self, num_classes: int) -> int:
    """The number of classes aimed at, at most all but the label."""
    return min(self.num_targets, num_classes - 1)

  def jobs(self, num_classes: int) -> int:
    """The number of jobs of an image."""
    return max(1, self.targets(num_classes)) * self.num_restarts

  def reachable(
    self,
    logits: Float[Array | np.ndarray, "b k"],
    targets: Integer[Array | np.ndarray, " b"],
  ) -> Bool[Array | np.ndarray, " b"]:
    """Returns for which images a job towards its target can succeed.

    It can't towards a class whose clean logit is -inf: that class is masked.

    Args:
      logits: the clean logits.
      targets: the class aimed at in each image.
    """
    if not self.num_targets:
      return targets == targets  # all true, in the library of the targets
    return logits[np.arange(len(targets)), targets] > -np.inf

  def notes(self, num_classes: int) -> list[str]:
    """Returns notes on where few classes change what the attack does."""
    count = self.targets(num_classes)
    if count == self.num_targets:
      return []
    return [
      f"{self.name}: {count} targets, all that {num_classes} classes have"
    ]

  def within(self, job: Job) -> ThreatModel:
    """Returns the threat model with the radius of each job."""
    return dataclasses.replace(self.threat, eps=job.eps)

  def begin(self, job: Job) -> S:
    """Returns the state of jobs that have not taken a step."""
    raise NotImplementedError

  def step(self, classify: Classify, job: Job, state: S) -> S:
    """Takes one step of each job and returns its state."""
    raise NotImplementedError

  def has_more(self, state: S) -> Bool[Array, " b"]:
    """Returns which jobs go on if their image proves to be no break."""
    return self.stop & (state.i < self.length)

  def retract(self, state: S, rows: Bool[Array, " b"]) -> S:
    """Lets jobs go on whose image proved to be no break.

    Args:
      state: the jobs.
      rows: which of them go on, as if they had not found that image.
    """
    return dataclasses.replace(
      state, found=state.found & ~rows, done=state.done & ~rows
    )

  def pick(self, job: Job, state: S) -> Images:
    """Returns the best image of each job: misclassified, if one was found."""
    raise NotImplementedError

  def __call__(
    self,
    logits_fn: Callable[..., Logits],
    images: Images,
    labels: Labels,
    keys: Keys,
    *,
    stochastic: bool = False,
  ) -> Images:
    """Runs the jobs of each image one after the other and returns the best.

    Images that are misclassified as they are, or at their target, come back
    unchanged.

    Args:
      logits_fn: `images -> logits`, or `(images, key) -> logits`.
      images: the clean ones, within the box, [b, *image].
      labels: their classes, or targets if it is targeted, [b].
      keys: one random key for each image, [b].
      stochastic: whether `logits_fn` takes a key.
    """
    classify = keyed(logits_fn, stochastic)
    logits = classify(images, keys)
    over = self.succeeds(logits, labels)
    num_classes = logits.shape[-1]
    rivals = losses.rivals(logits, labels, max(1, self.targets(num_classes)))

    def run(j: jax.Array, carry: _BestJob) -> _BestJob:
      best, merit, over = carry
      job = make_job(
        self.threat,
        images,
        labels,
        fold(keys, j),
        targets=rivals[:, j // self.num_restarts],
        restart=j % self.num_restarts,
      )
      state = self.begin(job)
      state = dataclasses.replace(
        state, done=over | ~self.reachable(logits, job.targets)
      )
      state, _ = proceed(self, classify, job, state, self.length)
      wins = ~over & (state.merit > merit)
      best, merit = where(
        wins, (self.pick(job, state), state.merit), (best, merit)
      )
      return best, merit, over | (state.found & self.stop)

    none = (jnp.asarray(images), jnp.full(labels.shape, -jnp.inf), over)
    return jax.lax.fori_loop(0, self.jobs(num_classes), run, none)[0]


def trajectory(
  attack: Search[S],
  logits_fn: Callable[[Images], Logits],
  images: Images,
  labels: Labels,
  *,
  noise: Images | None = None,
  targets: Labels | None = None,
) -> S:
  """Runs one job of each image to its end, from given noise: for comparisons.

  The searches follow official AutoAttack step by step. From its noise, and
  with `stop=False`, they reach its numbers.

  Args:
    attack: the search.
    logits_fn: `images -> logits`.
    images: the clean ones, of any float dtype, [b, *image].
    labels: their classes, [b].
    noise: scaled to the radius to make the start, [b, *image]: uniform in
      [-1, 1] for linf, else normal. None: zeros.
    targets: the classes aimed at, [b], by an attack with targets.

  Returns:
    The final state.
  """
  images = jnp.asarray(images)
  job = make_job(
    attack.threat,
    images,
    labels,
    per_image(root(0), jnp.arange(len(images))),
    targets=targets,
    noise=jnp.zeros_like(images) if noise is None else noise,
  )
  classify = keyed(logits_fn, False)
  return proceed(attack, classify, job, attack.begin(job), attack.length)[0]


def proceed(
  search: Search[S],
  classify: Classify,
  job: Job,
  state: S,
  most: int | Int[Array, ""],
) -> tuple[S, Int[Array, ""]]:
  """Runs jobs until all have ended, or have taken the given number of steps.

  Args:
    search: the attack.
    classify: the function under attack.
    job: the jobs.
    state: their progress.
    most: the largest number of further steps.

  Returns:
    The states, and how many steps the slowest job took.
  """

  def go_on(carry: tuple[Int[Array, ""], S]) -> Bool[Array, ""]:
    count, state = carry
    return (count < most) & ~state.done.all()

  def step(carry: tuple[Int[Array, ""], S]) -> tuple[Int[Array, ""], S]:
    count, state = carry
    stepped = search.step(classify, job, state)
    return count + 1, where(state.done, state, stepped)

  count, state = jax.lax.while_loop(go_on, step, (jnp.int32(0), state))
  return state, count


def keyed(logits_fn: Callable[..., Logits], stochastic: bool) -> Classify:
  """Returns the function as one of images and their keys.

  A randomised function sees each image alone, so that its draw for one image
  does not depend on the rest of the batch.

  Args:
    logits_fn: `images -> logits`, or `(images, key) -> logits`.
    stochastic: whether it takes a key.
  """
  if not stochastic:
    return lambda images, keys: logits_fn(images)
  return jax.vmap(lambda image, key: logits_fn(image[None], key)[0])


def ascent(
  climb: Callable[[Logits], Float[Array, " b"]],
  succeeds: Callable[[Logits], Bool[Array, " b"]],
  classify: Classify,
  images: Images,
  keys: Keys,
  num_draws: int = 1,
) -> Ascent:
  """Returns the value that is climbed, its gradient, and who succeeds.

  Over several draws it returns means, and whether most draws succeed.
  (Official AutoAttack averages the gradients alone, and takes the rest from the
  last draw.)

  Args:
    climb: `logits -> [b]`, the value of each image.
    succeeds: `logits -> [b]`, which images are where the attack wants them.
    classify: the function under attack.
    images: where the gradient is taken, [b, *image].
    keys: one random key for each image.
    num_draws: how many draws of a randomised function, >= 1.

  Returns:
    Values [b], gradients in the pixels [b, *image] with 0 in place of values
    that are not finite, and the mask of success [b].
  """

  def values(
    x: Images, draw_keys: Keys
  ) -> tuple[Float[Array, ""], tuple[Float[Array, " b"], Bool[Array, " b"]]]:
    logits = classify(x, draw_keys)
    value = climb(logits)
    return value.sum(), (value, succeeds(logits))

  def draw(k: int | jax.Array, total: _Draw | None) -> _Draw:
    grads, (value, wrong) = jax.grad(values, has_aux=True)(
      images, fold(keys, k)
    )
    drawn = (value, grads, wrong.astype(value.dtype))
    return drawn if total is None else jax.tree.map(jnp.add, total, drawn)

  total = draw(0, None)
  if num_draws > 1:
    total = jax.lax.fori_loop(1, num_draws, draw, total)
  value, grads, wrong = jax.tree.map(lambda x: x / num_draws, total)
  return value, base.finite(grads), wrong > 0.5
