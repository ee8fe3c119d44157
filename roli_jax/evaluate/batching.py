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
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered

from roli_jax import keys, progress, sharding
from roli_jax.attacks import search
from roli_jax.attacks.search import Job, Search, State
from roli_jax.evaluate import classifier
from roli_jax.evaluate.classifier import Classifier, Examples
from roli_jax.evaluate.tracing import KeyedLogits
from roli_jax.types import Array, Bool, Images, Int, Key, Keys, Logits, PyTree


@dataclasses.dataclass(frozen=True)
class Subjects:
  """What is attacked; NumPy arrays, one entry an image.

  Attributes:
    examples: the clean images, float32, their labels, and who they are.
    eps: the radius of each, [n].
    towards: [n, k], the classes aimed at, by the number of the target.
    noise: [n, ...], what searches start from; None draws it.
  """

  examples: Examples
  eps: np.ndarray
  towards: np.ndarray
  noise: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Ended:
  """Jobs that have ended since the last time; NumPy arrays, one entry a job.

  Attributes:
    rows: which of the images, int [b].
    jobs: which job of each of those images, int [b].
    found: whether the job claims to have found a misclassified image, bool [b].
    adv: that image, or the clean one, [b, ...].
    can_go_on: whether the job goes on if its claim proves false, bool [b].
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
    """Adds so many steps of jobs and of padding, of so many passes each."""
    forward, backward = passes
    self.forward += steps * forward
    self.backward += steps * backward
    self.padding_forward += padding * forward
    self.padding_backward += padding * backward


# Who is broken and who goes on, of jobs that have ended.
Settle = Callable[[Ended], tuple[np.ndarray, np.ndarray]]


def run(
  function: Classifier,
  attack: Search,
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
    settle: takes jobs that have ended, and returns which have broken their
      image, whose later jobs are called off; and which go on, since they have
      not. bool [b] each.
    work: what was computed is added to it.
    update: called with the number of steps that no longer have to be taken.
  """
  pool = _Pool(function, attack, subjects)
  queue = collections.deque(waiting)
  first_break: dict[int, int] = {}  # row -> the first job that broke the image

  def is_called_off(row: int, job: int) -> bool:
    return attack.stop and first_break.get(row, job) < job

  running = _NOBODY
  while True:
    pairs = zip(running.rows.tolist(), running.jobs.tolist(), strict=True)
    called_off = np.array([is_called_off(*pair) for pair in pairs], bool)
    update(int((attack.length - running.steps[called_off]).sum()))
    running = running.at(~called_off)
    fresh: list[tuple[int, int]] = []
    while queue and len(running) + len(fresh) < pool.function.sizes[-1]:
      pair = queue.popleft()
      if is_called_off(*pair):
        update(attack.length)
      else:
        fresh.append(pair)
    running = running.and_new(fresh)
    if not len(running):
      return
    before = running.steps
    running, done, total = pool.advance(running, len(fresh))
    new = int((running.steps - before).sum())
    work.add(new, total - new, attack.step_passes)
    ended = np.flatnonzero(done)
    if len(ended):
      claims = pool.claims(running.at(ended))
      broke, goes_on = settle(claims)
      rows, jobs = claims.rows[broke].tolist(), claims.jobs[broke].tolist()
      for row, job in zip(rows, jobs, strict=True):
        first_break[row] = min(job, first_break.get(row, job))
      running.again[ended] = goes_on
    over = done & ~running.again
    update(new + int((attack.length - running.steps)[over].sum()))
    running = running.at(~over)


def lower(
  function: Classifier, attack: Search, shape: tuple[int, ...]
) -> Lowered:
  """The program of a search's steps for the largest batch, not compiled.

  Args:
    function: the function; its params may be shapes.
    attack: the search.
    shape: (h, w, c) of an image.
  """
  nobody = Subjects(
    Examples(np.zeros((1, *shape), np.float32), *np.zeros((2, 1), np.int32)),
    eps=np.zeros(1, np.float32),
    towards=np.zeros((1, attack.num_targets or 1), np.int32),
  )
  return _Pool(function, attack, nobody).lower()


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
    """Those at these positions, or where the mask is True."""
    return _Running(*(x[which] for x in vars(self).values()))

  def and_new(self, fresh: list[tuple[int, int]]) -> "_Running":
    """These, and (row, job) of others behind them that have no place yet."""
    rows, jobs = np.array(fresh, np.int64).reshape(-1, 2).T
    none = np.zeros(len(fresh), np.int64)
    new = (rows, jobs, none, none, none.astype(bool))
    both = zip(vars(self).values(), new, strict=True)
    return _Running(*(np.concatenate(arrays) for arrays in both))


_NOBODY = _Running(*(np.zeros(0, np.int64),) * 4, np.zeros(0, bool))


class _Pool:
  """Jobs on the devices, in batches of few sizes.

  Attributes:
    function: the function.
    attack: the search.
    subjects: the images.
  """

  def __init__(self, function: Classifier, attack: Search, subjects: Subjects):
    self.function, self.attack, self.subjects = function, attack, subjects
    # The attack as a job sees it: other numbers of jobs compile nothing.
    self._of_a_job = dataclasses.replace(
      attack, num_restarts=1, num_targets=min(1, attack.num_targets)
    )
    self._key = keys.stream(keys.root(function.seed), attack.name)
    self._rows: tuple[Job, State] | None = None
    self._advance = function.programs.compiled(
      _advance, static_argnums=(0, 1), donate_argnums=(5, 6)
    )

  def advance(
    self, running: _Running, num_fresh: int
  ) -> tuple[_Running, np.ndarray, int]:
    """Gives jobs places and takes steps of them.

    Args:
      running: the jobs.
      num_fresh: how many of them, the last ones, have no place yet.

    Returns:
      The jobs where they are now, which of them are done, bool [b], and how
      many steps all rows have taken, those without a job among them.
    """
    total = len(running)
    size = min(s for s in self.function.sizes if s >= total)
    places = self.function.places(size, total)
    self._rows, counts = self._advance(
      self.function.mesh,
      self.function.dtype,
      self._of_a_job,
      self.function.params,
      math.ceil(math.sqrt(self.attack.length)),  # steps at most
      *self._packed(size, places, running, num_fresh),
    )
    state, counts = self._rows[1], sharding.fetch(counts)
    steps, done = (x[places] for x in sharding.fetch((state.i, state.done)))
    now = dataclasses.replace(
      running, slots=places, steps=steps, again=np.zeros(total, bool)
    )
    return now, done, int(counts.sum()) * (size // len(counts))

  def lower(self) -> Lowered:
    """The program that takes a full batch on by all steps, not compiled."""
    none = np.zeros(self.function.sizes[-1], np.int64)
    news = self._starts(none, none)
    news = jax.eval_shape(_keyed, self._key, news)
    rows = jax.eval_shape(_empty, self._of_a_job, news)
    fresh = jax.ShapeDtypeStruct(none.shape, bool)
    where = sharding.split(self.function.mesh)
    placed = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
      (*rows, fresh),
    )
    return self._advance.lower(
      self.function.mesh,
      self.function.dtype,
      self._of_a_job,
      self.function.params,
      self.attack.length,
      *placed,
    )

  def claims(self, ended: _Running) -> Ended:
    """What these jobs, which have ended, claim to have found."""
    assert self._rows is not None
    state = self._rows[1]
    found = sharding.fetch(state.found)[ended.slots]
    adv = self.subjects.examples.images[ended.rows]  # a copy, as of any indices
    can_go_on = np.zeros_like(found)
    if found.any():
      adv[found] = sharding.fetch(state.adv)[ended.slots[found]]
      can_go_on = sharding.fetch(self.attack.has_more(state))[ended.slots]
    return Ended(ended.rows, ended.jobs, found, adv, can_go_on)

  def _packed(
    self, size: int, places: np.ndarray, running: _Running, num_fresh: int
  ) -> tuple[Job, State, Bool[Array, " b"]]:
    """All jobs at their places, states, and which of them are to begin."""
    is_new = np.arange(len(places)) >= len(places) - num_fresh
    used = np.ones(len(places), bool)
    slots = running.slots.astype(np.int32)
    order, retract, fresh, used = (
      _placed(values, places, size)
      for values in (slots, running.again, is_new, used)
    )
    starts = self._starts(running.rows[is_new], running.jobs[is_new])
    news = {
      name: _placed(values, places[is_new], size)
      for name, values in starts.items()
    }
    *arrays, news = sharding.spread(
      (order, retract, fresh, used, news), self.function.mesh
    )
    news = _keyed(self._key, news)
    if self._rows is None:
      self._rows = _empty(self._of_a_job, news)
    return _pack(self.function.mesh, self._of_a_job, self._rows, *arrays, news)

  def _starts(
    self, rows: np.ndarray, jobs: np.ndarray
  ) -> dict[str, np.ndarray]:
    """What new jobs begin with, one row each: what `_job` takes."""
    subjects, examples = self.subjects, self.subjects.examples[rows]
    restarts = self.attack.num_restarts
    targets = np.minimum(jobs // restarts, subjects.towards.shape[1] - 1)
    starts = {
      "images": examples.images,
      "labels": examples.labels.astype(np.int32),
      "targets": subjects.towards[rows, targets].astype(np.int32),
      "restart": (jobs % restarts).astype(np.int32),
      "eps": subjects.eps[rows].astype(np.float32),
      "indices": examples.indices.astype(np.uint32),
      "jobs": jobs.astype(np.uint32),
    }
    if subjects.noise is not None:
      starts["noise"] = subjects.noise[rows]
    return starts


def _placed(values: np.ndarray, places: np.ndarray, size: int) -> np.ndarray:
  """Values at their places among so many rows; zeros elsewhere."""
  out = np.zeros((size, *values.shape[1:]), values.dtype)
  out[places] = values
  return out


# Apart, so that all attacks share it: of what `_pack` did once, deriving keys
# took longest to compile.
@jax.jit
def _keyed(key: Key[Array, ""], news: PyTree) -> PyTree:
  """The fields of new jobs: keys in place of who the image is and the job."""
  fields = dict(news)
  image_keys = keys.per_image(key, fields.pop("indices"))
  fields["keys"] = keys.fold(image_keys, fields.pop("jobs"))
  return fields


@jax.jit
def _empty(attack: Search, news: Mapping[str, jax.Array]) -> tuple[Job, State]:
  """A pool of no jobs."""
  job = Job(**news)
  state = jax.tree.map(jnp.zeros_like, attack.begin(job))
  return job, dataclasses.replace(state, done=jnp.ones_like(state.done))


@functools.partial(jax.jit, static_argnums=0)
def _pack(
  mesh: Mesh,
  attack: Search,
  pool: tuple[Job, State],
  order: Int[Array, " b"],
  retract: Bool[Array, " b"],
  fresh: Bool[Array, " b"],
  used: Bool[Array, " b"],
  news: Mapping[str, jax.Array],
) -> tuple[Job, State, Bool[Array, " b"]]:
  """The pool in another order, with new jobs, ready to go on.

  Args:
    mesh: the devices, over which rows are split.
    attack: the search.
    pool: jobs and states as they were.
    order: where each row was before.
    retract: whose claim proved false.
    fresh: which rows begin a new job.
    used: which rows have a job; the others are done.
    news: the fields of new jobs.
  """
  job, state = jax.tree.map(lambda x: x[order], pool)
  job = search.where(fresh, Job(**news), job)
  state = attack.retract(state, retract)
  state = dataclasses.replace(state, done=state.done | ~used)
  packed = (job, state, fresh)
  return jax.lax.with_sharding_constraint(packed, sharding.split(mesh))


def _advance(
  fn: KeyedLogits,
  mesh: Mesh,
  dtype: str | None,
  attack: Search,
  params: PyTree,
  most: int | Int[Array, ""],
  job: Job,
  state: State,
  fresh: Bool[Array, " b"],
) -> tuple[tuple[Job, State], Int[Array, " groups"]]:
  """Takes at most so many steps of each job; fresh ones begin first.

  Returns:
    The pool, and the steps of the slowest of each group of rows that was run
    together.
  """

  def go_on(
    whole: PyTree, job: Job, state: State, fresh: Bool[Array, " b"]
  ) -> tuple[State, Int[Array, "1"]]:
    attack, params, most = whole
    state = search.where(fresh, attack.begin(job), state)

    def classify(images: Images, image_keys: Keys) -> Logits:
      return classifier.lowered(fn, dtype)(params, images, image_keys)

    with jax.default_matmul_precision("default" if dtype else "highest"):
      state, count = search.proceed(attack, classify, job, state, most)
    return state, count[None]

  parts = (job, state, fresh)
  state, counts = classifier.map_in_eights(
    go_on, mesh, (attack, params, most), parts
  )
  return (job, state), counts
