"""Square: random search with squares, which needs no gradient.

Andriushchenko, Croce, Flammarion and Hein 2020, "Square Attack: a
query-efficient black-box adversarial attack via random search"; for L1 Croce
and Hein 2021, "Mind the box".
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import losses, trees
from roli_jax.attacks import search
from roli_jax.attacks.search import Classify, Job
from roli_jax.keys import fold
from roli_jax.threat import TINY, ThreatModel
from roli_jax.types import Images

P_INIT = 0.8  # the share of an image that the first squares cover
HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
L1_INSIDE = 1 - 1e-6  # of the radius, so that rounding does not leave the ball


@trees.tree_class
class SquareState(search.State):
  """Attributes beyond a search's:

  x: the image of the least margin.
  margin: of it; the label's logit minus the best other.
  """

  x: Any
  margin: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Square(search.Search):
  """Square on the margin, each image with squares of its own.

  (Official AutoAttack shares the squares among all images of a batch.) What
  is no picture is taken for one: [d] as d x 1 pixels, [h, w] as grey.

  Attributes:
    num_queries: after the first one.
    share: of the images that are attacked at all, drawn by their keys; less
      than 1 makes it a probe for masked gradients.
  """

  num_queries: int = search.static(5000)
  share: float = search.static(1.0)

  def __post_init__(self):
    super().__post_init__()
    if self.num_queries < 0:
      raise ValueError(f"num_queries must be >= 0, got {self.num_queries}")
    if self.num_targets:
      raise ValueError("square aims at no targets")

  @property
  def name(self) -> str:
    return "square"

  @property
  def num_steps(self) -> int:
    """As rows have it: queries."""
    return self.num_queries

  @property
  def length(self) -> int:
    return self.num_queries + 1

  @property
  def step_passes(self) -> tuple[int, int]:
    return self.eot, 0

  def begin(self, job: Job) -> SquareState:
    x = jnp.asarray(job.images)
    tossed = jax.vmap(jax.random.uniform)(fold(job.keys, "share"))
    far = jnp.full(len(x), jnp.inf, x.dtype)
    return SquareState(
      i=jnp.zeros(len(x), jnp.int32),
      adv=x,
      found=jnp.zeros(len(x), bool),
      done=tossed >= self.share,
      merit=-far,
      x=x,
      margin=far,
    )

  def step(
    self, classify: Classify, job: Job, state: SquareState
  ) -> SquareState:
    x = self._propose(job, state)
    draws = fold(job.keys, state.i)

    def look(k):
      own = fold(draws, k)
      logits = classify(x, own)
      wrong = ~losses.correct(logits, job.labels)
      return -losses.margin(logits, job.labels), wrong.astype(x.dtype)

    total = look(0)
    if self.eot > 1:
      total = jax.lax.fori_loop(
        1, self.eot, lambda k, t: jax.tree.map(jnp.add, t, look(k)), total
      )
    margin, wrong = total[0] / self.eot, total[1] > 0.5 * self.eot
    takes = (margin < state.margin) | wrong | (state.i == 0)
    at = search.at_pixels(takes, x)
    i, found = state.i + 1, state.found | wrong
    best = jnp.where(takes, margin, state.margin)
    return dataclasses.replace(
      state,
      i=i,
      x=jnp.where(at, x, state.x),
      adv=jnp.where(search.at_pixels(wrong, x), x, state.adv),
      margin=best,
      found=found,
      done=(found & self.stop) | (i >= self.length),
      merit=-best,
    )

  def pick(self, job: Job, state: SquareState) -> Images:
    del job
    found = search.at_pixels(state.found, state.x)
    return jnp.where(found, state.adv, state.x)

  def _propose(self, job: Job, state: SquareState) -> Images:
    shape = _picture(job.images.shape[1:])
    start, move = (
      (_stripes, _move_linf)
      if self.threat.norm == "linf"
      else (_tiles, _move_lp)
    )

    def one(image, x, key, i, eps):
      threat = dataclasses.replace(self.threat, eps=eps)
      image, x = image.reshape(shape), x.reshape(shape)
      first = start(threat, jax.random.fold_in(key, 0), image)
      side = _side(i - 1, shape, odd=threat.norm != "linf")
      moved = move(threat, jax.random.fold_in(key, i), image, x, side)
      return jnp.where(i == 0, first, moved)

    keys = fold(job.keys, "squares")
    x = jax.vmap(one)(jnp.asarray(job.images), state.x, keys, state.i, job.eps)
    return x.reshape(job.images.shape)


def _picture(shape: tuple[int, ...]) -> tuple[int, int, int]:
  """Height, width and channels of what may be no picture."""
  if len(shape) > 3:
    raise ValueError(f"square wants images [h, w, c], got {shape}")
  height, width, channels = (*shape, 1, 1, 1)[:3]
  return height, width, channels


def _side(query, shape, odd: bool):
  """The side of the squares at a query: smaller and smaller."""
  height, width, _ = shape
  halvings = sum((query > at).astype(np.int32) for at in HALVED_AT)
  area = P_INIT * height * width / 2.0**halvings
  side = jnp.round(jnp.sqrt(area)).astype(np.int32)
  if odd:
    side = jnp.maximum(side, 3)
    side = side + (side + 1) % 2
  return jnp.clip(side, 1, min(height, width))


def _signs(key, shape, dtype):
  return jax.random.rademacher(key, shape, dtype)


def _corner(key, shape, side):
  """Where a square of that side lies, anywhere within the picture."""
  at = jax.random.uniform(key, (2,))
  free = jnp.array(shape[:2]) - side + 1
  return jnp.floor(at * free).astype(np.int32)


def _within(shape, corner, side):
  """Coordinates from the corner, and whether a pixel is in the square."""
  rows = jnp.arange(shape[0])[:, None] - corner[0]
  columns = jnp.arange(shape[1])[None, :] - corner[1]
  rows, columns = jnp.broadcast_arrays(rows, columns)
  inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
  return rows, columns, inside[..., None]


def _alone(project, x, image):
  """A projection of batches, for one image."""
  return project(x[None], image[None])[0]


def _stripes(threat: ThreatModel, key, image):
  """Vertical stripes at the edge of the ball."""
  signs = _signs(key, (1, *image.shape[1:]), image.dtype)
  return jnp.clip(image + threat.eps * signs, threat.low, threat.high)


def _move_linf(threat: ThreatModel, key, image, x, side):
  """One square to the ball's edge, the same way in all of its pixels."""
  place, sign = jax.random.split(key)
  *_, inside = _within(x.shape, _corner(place, x.shape, side), side)
  signs = _signs(sign, (1, 1, x.shape[2]), x.dtype)
  moved = x + jnp.where(inside, 2 * threat.eps * signs, 0)
  return _alone(threat.project, moved, image)


def _tiles(threat: ThreatModel, key, image):
  """Bumps of random signs and directions, all over the picture."""
  height, width, channels = image.shape
  side = max(min(height, width) // 5, 1)
  grid = (height // side, width // side)
  turn, sign = jax.random.split(key)
  signs = _signs(sign, (*grid, channels), image.dtype)
  turned = jax.random.bernoulli(turn, shape=grid)
  rows, columns = (
    np.arange(n) - (n - side * m) // 2
    for n, m in zip((height, width), grid, strict=True)
  )
  on_grid = (rows >= 0) & (rows < side * grid[0])
  covered = on_grid[:, None] & (columns >= 0) & (columns < side * grid[1])
  tile = (
    np.clip(rows // side, 0, grid[0] - 1)[:, None],
    np.clip(columns // side, 0, grid[1] - 1)[None, :],
  )
  down, across = np.broadcast_arrays(
    (rows % side)[:, None], (columns % side)[None, :]
  )
  bump = _bump(threat.norm, down, across, side, side)
  bump = jnp.where(
    turned[tile], _bump(threat.norm, across, down, side, side), bump
  )
  offset = jnp.where(covered[..., None], bump[..., None] * signs[tile], 0)
  offset = offset.astype(image.dtype)
  if threat.norm == "l1":
    return _alone(_inside(threat).project, image + offset, image)
  length = jnp.sqrt(jnp.square(offset).sum())
  moved = image + threat.eps * offset / (length + TINY)
  return _alone(threat.project, moved, image)


def _move_lp(threat: ThreatModel, key, image, x, side):
  """The offset of one square goes to another, as a bump with what is left."""
  to, off, turn, sign = jax.random.split(key, 4)
  down, across, to = _within(x.shape, _corner(to, x.shape, side), side)
  *_, off = _within(x.shape, _corner(off, x.shape, side), side)
  turned = jax.random.bernoulli(turn)
  down, across = (
    jnp.where(turned, across, down),
    jnp.where(turned, down, across),
  )
  size = max(x.shape[:2])
  bump = _bump(threat.norm, down, across, side, size).astype(x.dtype)
  signs = _signs(sign, (1, 1, x.shape[2]), x.dtype)
  offset, channels = x - image, x.shape[2]

  def length(values, axes=(0, 1)):  # of each channel
    if threat.norm == "l1":
      return jnp.abs(values).sum(axes, keepdims=True)
    return jnp.sqrt(jnp.square(values).sum(axes, keepdims=True))

  there = jnp.where(to, offset, 0)
  new = jnp.where(
    to, bump[..., None] * signs + there / (TINY + length(there)), 0
  )
  freed = length(jnp.where(to | off, offset, 0))
  whole = length(offset, (0, 1, 2))
  if threat.norm == "l1":
    left = jnp.maximum(threat.eps - whole, 0) / channels
    budget = (left + freed) * channels
  else:
    left = jnp.maximum(threat.eps**2 - whole**2, 0) / channels
    budget = jnp.sqrt(left + freed**2)
  new = new * budget / (TINY + length(new))
  offset = jnp.where(to, new, jnp.where(off, 0, offset))
  if threat.norm == "l1":
    return _alone(_inside(threat).project, image + offset, image)
  ratio = threat.eps / (TINY + length(offset, (0, 1, 2)))
  return _alone(threat.project, image + offset * ratio, image)


def _inside(threat: ThreatModel) -> ThreatModel:
  return dataclasses.replace(threat, eps=threat.eps * L1_INSIDE)


def _bump(norm: str, down, across, side, size: int):
  """The two halves of a square, one up and one down, of unit length in all.

  Args:
    norm: of the length.
    down: rows within the square; outside of it anything comes out.
    across: columns.
    side: of the square.
    size: the largest side that there may be.
  """
  upper = side // 2
  values = jnp.where(
    down < upper,
    _pyramid(norm, down, across, upper, side, size),
    -_pyramid(norm, down - upper, across, side - upper, side, size),
  )
  halves = jnp.where(upper > 0, 2, 1)  # each of unit length
  return values / (jnp.sqrt(halves) if norm == "l2" else halves)


def _pyramid(norm, down, across, height, width, size):
  """Steps that rise towards the middle of a rectangle, of unit length."""
  power = 2 if norm == "l2" else 4
  rings = np.cumsum([0.0] + [1 / (m + 1) ** power for m in range(size + 1)])
  rings = jnp.asarray(rings)
  steps = jnp.maximum(height // 2, width // 2) + 1

  def at(down, across):
    ring = jnp.maximum(
      jnp.abs(down - height // 2), jnp.abs(across - width // 2)
    )
    return rings[steps] - rings[jnp.clip(ring, 0, size + 1)]

  rows, columns = jnp.arange(size)[:, None], jnp.arange(size)[None, :]
  values = jnp.where((rows < height) & (columns < width), at(rows, columns), 0)
  length = jnp.sqrt(jnp.square(values).sum()) if norm == "l2" else values.sum()
  return at(down, across) / jnp.maximum(length, TINY)


def sides(shape: tuple[int, int], norm: str, query: int) -> int:
  """The side of the squares at a query of images of height and width."""
  odd = norm != "linf"
  return int(_side(jnp.asarray(query), (*shape, 1), odd))
