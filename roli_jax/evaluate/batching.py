"""Searches of many images at once, packed so that no row of a batch idles.

A pool is a batch of jobs. After every few steps those that have ended leave
it, those of images that have fallen are called off, and jobs that wait take
their rows. Jobs of an image are started in their order; the first of them that
breaks it is the one that counts, whenever it does, so that nothing depends on
what ran beside what.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import keys, progress, sharding
from roli_jax.attacks import search
from roli_jax.evaluate import classifier
from roli_jax.evaluate.classifier import Classifier


@dataclasses.dataclass(frozen=True)
class Subjects:
  """What is attacked; NumPy arrays, one entry an image.

  Attributes:
    images: the clean ones, float32.
    labels: their classes.
    indices: who each is.
    eps: the radius of each.
    towards: [n, k], the classes aimed at, by the number of the target.
    noise: what searches start from; None draws it.
  """

  images: np.ndarray
  labels: np.ndarray
  indices: np.ndarray
  eps: np.ndarray
  towards: np.ndarray
  noise: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Ended:
  """Jobs that have ended since the last time; NumPy arrays, one entry a job.

  Attributes:
    rows: which of the images, int [b].
    jobs: which job of each of those images, int [b].
    found: whether the job claims to have found a misclassified image.
    adv: that image, or the clean one.
    can_go_on: whether a claim that proves false leaves steps to take.
  """

  rows: np.ndarray
  jobs: np.ndarray
  found: np.ndarray
  adv: np.ndarray
  can_go_on: np.ndarray


@dataclasses.dataclass
class Work:
  """What was computed: forward and backward passes of single images.

  Attributes:
    forward: forward passes of jobs.
    backward: backward passes of jobs.
    padding_forward: forward passes of rows without a job, or of an ended one.
    padding_backward: backward passes of such rows.
    seconds: how long all of it took.
  """

  forward: int = 0
  backward: int = 0
  padding_forward: int = 0
  padding_backward: int = 0
  seconds: float = 0.0

  def __add__(self, other: "Work") -> "Work":
    mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
    return Work(*(a + b for a, b in zip(mine, theirs, strict=True)))

  def add(self, steps: int, padding: int, passes: tuple[int, int]) -> None:
    """So many steps of jobs and of padding, of so many passes each."""
    forward, backward = passes
    self.forward += steps * forward
    self.backward += steps * backward
    self.padding_forward += padding * forward
    self.padding_backward += padding * backward


# Who is broken and who goes on, of jobs that have ended.
Settle = Callable[[Ended], tuple[np.ndarray, np.ndarray]]


def run(
  function: Classifier,
  attack: search.Search,
  subjects: Subjects,
  waiting: Iterable[tuple[int, int]],
  settle: Settle,
  work: Work,
  update: progress.Update,
) -> None:
  """Runs jobs until all have ended.

  Args:
    function: the function.
    attack: the search.
    subjects: the images.
    waiting: (row, job) of each job, in the order in which they start.
    settle: told of jobs that have ended, says which have broken their image,
      whose later jobs are called off; and which go on, since they have not.
    work: what was computed is added to it.
    update: told of steps that are no longer to be taken.
  """
  key = keys.stream(keys.root(function.seed), attack.name)
  sizes = function.sizes
  if classifier.runs_on_cpu(function.mesh):
    sizes = sizes[-1:]  # eight rows without a job cost nothing there
  queue = collections.deque(waiting)
  fallen: dict[int, int] = {}  # row -> the first job that broke the image
  running, pool = _NOBODY, None
  advance = function.programs.compiled(
    _advance, static_argnums=(0, 1), donate_argnums=(5, 6)
  )
  while True:
    called_off = _called_off(attack, fallen, running)
    update(int((attack.length - running.steps[called_off]).sum()))
    running = running.at(~called_off)
    fresh = _next(queue, attack, fallen, sizes[-1] - len(running), update)
    running = running.and_new(fresh)
    total = len(running)
    if not total:
      return
    size = min(s for s in sizes if s >= total)
    places = _places(size, function.mesh.size)[:total]
    pool = _filled(
      function, attack, subjects, key, pool, size, places, running, len(fresh)
    )
    pool, counts = advance(
      function.mesh,
      function.dtype,
      _of_a_job(attack),
      function.params,
      math.ceil(math.sqrt(attack.length)),  # steps at most
      *pool,
    )
    state, counts = pool[1], sharding.fetch(counts)
    steps, done = (x[places] for x in sharding.fetch((state.i, state.done)))
    new = int((steps - running.steps).sum())
    idle = int(counts.sum()) * (size // len(counts)) - new
    work.add(new, idle, attack.step_passes)
    running = dataclasses.replace(
      running, slots=places, steps=steps, again=np.zeros(total, bool)
    )
    ended = np.flatnonzero(done)
    if len(ended):
      told = _ended(running.at(ended), state, subjects, attack)
      broke, goes_on = settle(told)
      for row, job in zip(told.rows[broke], told.jobs[broke], strict=True):
        fallen[row] = min(job, fallen.get(row, job))
      running.again[ended] = goes_on
    over = done & ~running.again
    update(new + int((attack.length - steps)[over].sum()))
    running = running.at(~over)


def lower(
  function: Classifier, attack: search.Search, shape: tuple[int, ...]
) -> jax.stages.Lowered:
  """The program that takes a full pool on by all steps, not compiled.

  Args:
    function: the function; its params may be shapes.
    attack: the search.
    shape: (h, w, c) of an image.
  """
  size, one = function.sizes[-1], _of_a_job(attack)
  aims = attack.num_targets or 1
  nobody = Subjects(
    images=np.zeros((1, *shape), np.float32),
    labels=np.zeros(1, np.int32),
    indices=np.zeros(1, np.uint32),
    eps=np.zeros(1, np.float32),
    towards=np.zeros((1, aims), np.int32),
  )
  first = np.zeros(1, np.int64)
  news = _news(attack, nobody, size, first, first, first)
  pool = jax.eval_shape(_empty, one, keys.root(function.seed), news)
  fresh = jax.ShapeDtypeStruct((size,), bool)
  rows = sharding.split(function.mesh)
  job, state, fresh = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows),
    (*pool, fresh),
  )
  advance = function.programs.compiled(
    _advance, static_argnums=(0, 1), donate_argnums=(5, 6)
  )
  return advance.lower(
    function.mesh, function.dtype, one, function.params, attack.length,
    job, state, fresh,
  )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Running:
  """Jobs that have a place in the pool; NumPy arrays, one entry a job.

  Attributes:
    rows: which of the images, int [b].
    jobs: which job of each of those images, int [b].
    slots: their places in the pool, int [b].
    steps: steps taken, int [b].
    again: whether a claim of theirs proved false, so that they go on, bool [b].
  """

  rows: np.ndarray
  jobs: np.ndarray
  slots: np.ndarray
  steps: np.ndarray
  again: np.ndarray

  def __len__(self) -> int:
    return len(self.rows)

  def at(self, which: np.ndarray) -> "_Running":
    """Those at these positions, or where the mask says so."""
    return _Running(
      *(getattr(self, f.name)[which] for f in dataclasses.fields(self))
    )

  def and_new(self, fresh: list[tuple[int, int]]) -> "_Running":
    """These, and (row, job) of others behind them that have no place yet."""
    rows, jobs = np.array(fresh, np.int64).reshape(-1, 2).T
    none = np.zeros(len(fresh), np.int64)
    new = _Running(rows, jobs, none, none, none.astype(bool))
    return _Running(
      *(
        np.concatenate([getattr(self, f.name), getattr(new, f.name)])
        for f in dataclasses.fields(self)
      )
    )


_NONE = np.zeros(0, np.int64)
_NOBODY = _Running(
  rows=_NONE, jobs=_NONE, slots=_NONE, steps=_NONE, again=_NONE.astype(bool)
)


def _next(queue, attack, fallen, most, update):
  """At most so many jobs from the queue, without those of fallen images."""
  fresh: list[tuple[int, int]] = []
  while queue and len(fresh) < most:
    row, job = queue.popleft()
    if attack.stop and fallen.get(row, job) < job:
      update(attack.length)
    else:
      fresh.append((row, job))
  return fresh


def _ended(running, state, subjects, attack):
  """What these jobs, which have ended, claim to have found."""
  found = sharding.fetch(state.found)[running.slots]
  adv = subjects.images[running.rows].copy()
  if found.any():
    adv[found] = sharding.fetch(state.adv)[running.slots[found]]
  can_go_on = running.steps < attack.length
  return Ended(running.rows, running.jobs, found, adv, can_go_on)


def _of_a_job(attack):
  """The attack as a job sees it: other numbers of jobs compile nothing."""
  return dataclasses.replace(
    attack, num_restarts=1, num_targets=min(1, attack.num_targets)
  )


def _called_off(attack, fallen, running):
  """The jobs of images that fell to an earlier one."""
  if not attack.stop:
    return np.zeros(len(running), bool)
  pairs = zip(running.rows, running.jobs, strict=True)
  firsts = [fallen.get(row, job) for row, job in pairs]
  return np.array(firsts, np.int64) < running.jobs


def _places(size: int, devices: int) -> np.ndarray:
  """The rows of a pool in the order in which they are filled.

  By eights, each device in turn: few jobs are spread over all of them.
  """
  eights = np.arange(size).reshape(devices, -1, classifier.SMALLEST)
  return eights.swapaxes(0, 1).ravel()


def _filled(
  function, attack, subjects, key, pool, size, places, running, num_fresh
):
  """The pool with its jobs at their places, new ones at theirs.

  Returns:
    Jobs, states, and which of them are to begin.
  """
  order = np.zeros(size, np.int32)
  order[places] = running.slots
  retract, fresh = np.zeros(size, bool), np.zeros(size, bool)
  retract[places] = running.again
  first = len(places) - num_fresh
  starts, new = places[first:], running.at(np.arange(first, len(places)))
  fresh[starts] = True
  news = _news(attack, subjects, size, starts, new.rows, new.jobs)
  used = np.zeros(size, bool)
  used[places] = True
  arrays = sharding.spread((order, retract, fresh, used, news), function.mesh)
  if pool is None:
    pool = _empty(_of_a_job(attack), key, arrays[-1])
  return _pack(function.mesh, _of_a_job(attack), key, pool, *arrays)


def _news(attack, subjects, size, starts, rows, jobs):
  """Arrays of new jobs at their places; zeros elsewhere."""
  most = subjects.towards.shape[1] - 1
  targets = np.minimum(jobs // attack.num_restarts, most)
  values = {
    "images": subjects.images[rows],
    "labels": subjects.labels[rows].astype(np.int32),
    "targets": subjects.towards[rows, targets].astype(np.int32),
    "restart": (jobs % attack.num_restarts).astype(np.int32),
    "eps": subjects.eps[rows].astype(np.float32),
    "indices": subjects.indices[rows].astype(np.uint32),
    "jobs": jobs.astype(np.uint32),
  }
  if subjects.noise is not None:
    values["noise"] = subjects.noise[rows]

  def placed(value):
    out = np.zeros((size, *value.shape[1:]), value.dtype)
    out[starts] = value
    return out

  return {name: placed(value) for name, value in values.items()}


def _job(key, news):
  own = keys.per_image(key, news["indices"])
  return search.Job(
    images=news["images"],
    labels=news["labels"],
    targets=news["targets"],
    restart=news["restart"],
    eps=news["eps"],
    keys=keys.fold(own, news["jobs"]),
    noise=news.get("noise"),
  )


@jax.jit
def _empty(attack, key, news):
  """A pool of no jobs."""
  job = _job(key, news)
  state = jax.tree.map(jnp.zeros_like, attack.begin(job))
  return job, dataclasses.replace(state, done=jnp.ones_like(state.done))


@functools.partial(jax.jit, static_argnums=0)
def _pack(mesh, attack, key, pool, order, retract, fresh, used, news):
  """The pool in another order, with new jobs, ready to go on."""
  job, state = jax.tree.map(lambda x: x[order], pool)
  job = search.where(fresh, _job(key, news), job)
  state = attack.retract(state, retract)
  state = dataclasses.replace(state, done=state.done | ~used)
  packed = (job, state, fresh)
  return jax.lax.with_sharding_constraint(packed, sharding.split(mesh))


def _advance(fn, mesh, dtype, attack, params, most, job, state, fresh):
  """At most so many steps of each job.

  Returns:
    The pool, and the steps of the slowest of each group of rows that was run
    together.
  """

  def go_on(whole, job, state, fresh):
    attack, params, most = whole
    state = search.where(fresh, attack.begin(job), state)

    def classify(images, image_keys):
      return classifier.lowered(fn, dtype)(params, images, image_keys)

    with jax.default_matmul_precision("default" if dtype else "highest"):
      state, count = search.proceed(attack, classify, job, state, most)
    return state, count[None]

  parts = (job, state, fresh)
  state, counts = classifier.map_in_eights(
    go_on, mesh, (attack, params, most), parts
  )
  return (job, state), counts
