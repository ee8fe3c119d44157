"""Attacks that search step by step: what they share.

A search is a set of *jobs* for each image, one for each target class and
restart. A job is a state and a step, both of which hold one row a job and
never look across rows. Whoever runs them may thus stop, pack, and go on as it
likes: an image's result is its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import losses, trees
from roli_jax.attacks import base
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

S = TypeVar("S", bound="State")

# `(images, keys) -> logits`; a deterministic function ignores the keys.
Classify = Callable[[Images, Keys], Logits]


@trees.tree_class
class Job:
  """What is searched for; arrays of one row a job.

  (Their shapes stand here and not in annotations: a loop over parts of a pool
  has one axis more.)

  Attributes:
    images: the clean ones.
    labels: their classes.
    targets: the classes aimed at, where a search aims.
    restart: which of its target's jobs it is.
    eps: the radius of each.
    keys: of each.
    noise: what the start is made from; None draws it from the keys.
  """

  images: Any
  labels: Any
  targets: Any
  restart: Any
  eps: Any
  keys: Any
  noise: Any = None


@trees.tree_class
class State:
  """How far each job is.

  Attributes:
    i: steps taken.
    adv: a misclassified image of the threat model, where one was found.
    found: whether one was.
    done: whether the job has ended.
    merit: how good `pick` is, to choose among an image's jobs.
  """

  i: Any
  adv: Any
  found: Any
  done: Any
  merit: Any


def static(default: Any) -> Any:
  """A field that is part of a search's structure: another value recompiles."""
  return dataclasses.field(default=default, metadata=trees.STATIC)


@dataclasses.dataclass(frozen=True)
class Search(base.Attack):
  """An attack that searches; subclasses are frozen dataclasses and pytrees.

  Attributes:
    threat: the ball and the box; data, other radii compile nothing.
    num_restarts: jobs for each target, from starts of their own.
    num_targets: classes aimed at, in the order of their clean logits, at most
      all but the label; 0 aims at none.
    stop: whether an image's search ends as soon as it is misclassified.
    eot: draws of a randomised function that each step's loss and gradient are
      means of (expectation over transformation, Athalye et al. 2018).
  """

  threat: ThreatModel
  num_restarts: int = static(1)
  num_targets: int = static(0)
  stop: bool = static(True)
  eot: int = static(1)
  is_search: ClassVar[bool] = True

  def __post_init__(self):
    for field in ("num_restarts", "eot"):
      if getattr(self, field) < 1:
        raise ValueError(f"{field} must be >= 1, got {getattr(self, field)}")
    if self.num_targets < 0:
      raise ValueError(f"num_targets must be >= 0, got {self.num_targets}")

  @property
  def length(self) -> int:
    """Steps of a job."""
    raise NotImplementedError

  @property
  def step_passes(self) -> tuple[int, int]:
    """Forward and backward passes of a step."""
    raise NotImplementedError

  @property
  def passes(self) -> tuple[int, int]:
    """Forward and backward passes that a robust image costs at most."""
    jobs = max(self.num_targets, 1) * self.num_restarts
    forward, backward = self.step_passes
    return jobs * self.length * forward, jobs * self.length * backward

  def targets(self, num_classes: int) -> int:
    """How many classes are aimed at, of so many that there are."""
    return min(self.num_targets, num_classes - 1)

  def jobs(self, num_classes: int) -> int:
    """How many jobs an image has."""
    return max(1, self.targets(num_classes)) * self.num_restarts

  def reachable(
    self,
    logits: Float[Array | np.ndarray, "b k"],
    targets: Integer[Array | np.ndarray, "b"],
  ) -> Bool[Array | np.ndarray, "b"]:
    """For which images jobs towards these classes make sense.

    Not towards a class whose clean logit is -inf: it is masked.
    """
    if not self.num_targets:
      return targets == targets
    return logits[np.arange(len(targets)), targets] > -np.inf

  def notes(self, num_classes: int) -> list[str]:
    """What is done in another way than the name says, for so few classes."""
    count = self.targets(num_classes)
    if count == self.num_targets:
      return []
    return [
      f"{self.name}: {count} targets, all that {num_classes} classes have"
    ]

  def within(self, job: Job) -> ThreatModel:
    """The threat model with each job's own radius."""
    return dataclasses.replace(self.threat, eps=job.eps)

  def begin(self, job: Job) -> Any:
    """The state of jobs that have not taken a step."""
    raise NotImplementedError

  def step(self, classify: Classify, job: Job, state: Any) -> Any:
    """One step of each job."""
    raise NotImplementedError

  def retract(self, state: Any, rows: Bool[Array, "b"]) -> Any:
    """The state of jobs whose claim proved false, ready to go on."""
    return dataclasses.replace(
      state, found=state.found & ~rows, done=state.done & ~rows
    )

  def pick(self, job: Job, state: Any) -> Images:
    """The image that each job offers: misclassified, if one was found."""
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
    """For each image the best of its jobs, one after the other.

    Images that are misclassified as they are come back as they are.

    Args:
      logits_fn: `images -> logits`, or `(images, key) -> logits`.
      images: the clean ones, within the box.
      labels: their classes.
      keys: of each image.
      stochastic: whether `logits_fn` takes a key.
    """
    classify = keyed(logits_fn, stochastic)
    logits = classify(images, keys)
    right = losses.correct(logits, labels)
    num_classes = logits.shape[-1]
    rivals = losses.rivals(logits, labels, max(1, self.targets(num_classes)))
    eps = jnp.broadcast_to(
      jnp.asarray(self.threat.eps, images.dtype), labels.shape
    )

    def run(j, carry):
      best, merit, over = carry
      job = Job(
        images=images,
        labels=labels,
        targets=rivals[:, j // self.num_restarts],
        restart=jnp.full(labels.shape, j % self.num_restarts),
        eps=eps,
        keys=fold(keys, j),
      )
      state = self.begin(job)
      state = dataclasses.replace(
        state, done=over | ~self.reachable(logits, job.targets)
      )
      state, _ = proceed(self, classify, job, state, self.length)
      wins = ~over & (state.merit > merit)
      best = jnp.where(at_pixels(wins, best), self.pick(job, state), best)
      return (
        best,
        jnp.where(wins, state.merit, merit),
        over | (state.found & self.stop),
      )

    none = (jnp.asarray(images), jnp.full(labels.shape, -jnp.inf), ~right)
    return jax.lax.fori_loop(0, self.jobs(num_classes), run, none)[0]


def trajectory(
  attack: Search,
  logits_fn: Callable[[Images], Logits],
  images: Images,
  labels: Labels,
  *,
  noise: Images | None = None,
  targets: Labels | None = None,
) -> Any:
  """Where one job of each image ends, from given noise: for comparisons.

  The searches follow official AutoAttack step by step. From its noise, and
  with `stop=False`, they reach its numbers.

  Args:
    attack: the search.
    logits_fn: `images -> logits`.
    images: the clean ones, of any float dtype.
    labels: their classes.
    noise: that the start is made from, before it is scaled to the radius:
      uniform in [-1, 1] for linf, else normal. None: zeros.
    targets: classes aimed at, by an attack that aims.

  Returns:
    The final state.
  """
  images = jnp.asarray(images)
  count = len(images)
  job = Job(
    images=images,
    labels=labels,
    targets=labels if targets is None else targets,
    restart=jnp.zeros(count, jnp.int32),
    eps=jnp.full(count, attack.threat.eps, images.dtype),
    keys=per_image(root(0), jnp.arange(count)),
    noise=jnp.zeros_like(images) if noise is None else noise,
  )
  state, _ = proceed(
    attack, keyed(logits_fn, False), job, attack.begin(job), attack.length
  )
  return state


def proceed(
  search: Search, classify: Classify, job: Job, state: S, most: Any
) -> tuple[S, Int[Array, ""]]:
  """At most so many further steps of the jobs that have not ended.

  Returns:
    The states, and for how many steps the slowest job went on.
  """

  def go_on(carry):
    count, state = carry
    return (count < most) & ~state.done.all()

  def step(carry):
    count, state = carry
    return count + 1, where(
      state.done, state, search.step(classify, job, state)
    )

  count, state = jax.lax.while_loop(go_on, step, (0, state))
  return state, jnp.asarray(count)


def where(rows: Bool[Array, "b"], yes: Any, no: Any) -> Any:
  """Of two trees, the one's rows where the mask says so, else the other's."""
  return jax.tree.map(lambda a, b: jnp.where(at_pixels(rows, a), a, b), yes, no)


def at_pixels(rows: Bool[Array, "b"], like: Any) -> Bool[Array, "..."]:
  """One value a row, shaped to broadcast."""
  return rows.reshape(-1, *(1,) * (like.ndim - 1))


def keyed(logits_fn: Callable[..., Logits], stochastic: bool) -> Classify:
  """The function as one of images and their keys.

  A randomised function sees each image alone: what it draws for one does not
  depend on who stands beside it.
  """
  if not stochastic:
    return lambda images, keys: logits_fn(images)
  return jax.vmap(lambda image, key: logits_fn(image[None], key)[0])


def ascent(
  climb: Callable[[Logits], Float[Array, "b"]],
  classify: Classify,
  images: Images,
  labels: Labels,
  keys: Keys,
  num_draws: int = 1,
) -> tuple[Float[Array, "b"], Images, Bool[Array, "b"]]:
  """What is climbed, its gradient in the pixels, and who is misclassified.

  Of several draws the means, and whether most are misclassified. (Official
  AutoAttack takes the mean of the gradients alone, the rest of the last draw.)
  Values of a gradient that are not finite are 0.
  """

  def values(x, keys):
    logits = classify(x, keys)
    value = climb(logits)
    return value.sum(), (value, ~losses.correct(logits, labels))

  def draw(k, total):
    own = fold(keys, k)
    grads, (value, wrong) = jax.grad(values, has_aux=True)(images, own)
    drawn = (value, grads, wrong.astype(value.dtype))
    return drawn if total is None else jax.tree.map(jnp.add, total, drawn)

  total = draw(0, None)
  if num_draws > 1:
    total = jax.lax.fori_loop(1, num_draws, draw, total)
  value, grads, wrong = jax.tree.map(lambda x: x / num_draws, total)
  return value, base.finite(grads), wrong > 0.5


def noise(job: Job, norm: str) -> Images:
  """What starts are made from: given, or uniform for linf, else normal."""
  if job.noise is not None:
    return jnp.asarray(job.noise)
  shape, dtype = job.images.shape[1:], job.images.dtype

  def draw(key):
    if norm == "linf":
      return jax.random.uniform(key, shape, dtype, -1.0, 1.0)
    return jax.random.normal(key, shape, dtype)

  return jax.vmap(draw)(job.keys)
