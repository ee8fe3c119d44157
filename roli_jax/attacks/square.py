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
from roli_jax.attacks import base, jobs, search
from roli_jax.attacks.jobs import Job
from roli_jax.attacks.search import Classify
from roli_jax.keys import fold
from roli_jax.threat import TINY, ThreatModel
from roli_jax.types import Array, Bool, Float, Images, Int, Key

P_INIT = 0.8  # the share of an image that the first squares cover
# The queries after which squares cover half as much, made for 10,000 queries;
# AutoAttack does not rescale them for its 5000 either.
HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
L1_INSIDE = 1 - 1e-6  # scales the radius: rounding then stays in the ball

# Within a `jax.vmap` over images: one image, or an array as large; its key; and
# the side of a square.
Image = Float[Array, "h w c"]
ImageKey = Key[Array, ""]
Side = Int[Array, ""]
# An index of pixels, known when compiled or not.
Indices = Int[Array | np.ndarray, "h w"]


@trees.tree_class
class SquareState(jobs.State):
  """The state of b jobs of Square.

  Attributes:
    x: float [b, *image], the image of the least margin so far.
    margin: float [b], its margin, the label's logit minus the best other; inf
      before the first query.
  """

  x: Any
  margin: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Square(search.Search[SquareState]):
  """Square on the margin, with other squares for each image.

  (Official AutoAttack shares the squares among all images of a batch.) Arrays
  of fewer axes count as images: [d] as d x 1 pixels, [h, w] as one channel.

  Attributes:
    num_queries: queries after the first one, >= 0; 5000 by default.
    share: the share of the images that are attacked at all, in [0, 1], drawn by
      their keys; less than 1 makes it a probe for masked gradients.
  """

  num_queries: int = base.static(5000)
  share: float = base.static(1.0)

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
    """The queries after the first: the number of steps in result rows."""
    return self.num_queries

  @property
  def length(self) -> int:
    return self.num_queries + 1

  @property
  def step_passes(self) -> tuple[int, int]:
    return self.eot, 0

  def begin(self, job: Job) -> SquareState:
    tossed = jax.vmap(jax.random.uniform)(fold(job.keys, "share"))
    fresh = jobs.fresh_state(job) | {"done": tossed >= self.share}
    return SquareState(**fresh, x=fresh["adv"], margin=-fresh["merit"])

  def step(
    self, classify: Classify, job: Job, state: SquareState
  ) -> SquareState:
    x = self._propose(job, state)
    draws = fold(job.keys, state.i)

    def look(k: int | jax.Array) -> tuple[jax.Array, jax.Array]:
      """The margins, and who succeeds (1 or 0), of one draw, [b]."""
      logits = classify(x, fold(draws, k))
      wrong = self.succeeds(logits, job.labels)
      ahead = losses.margin(logits, job.labels)
      margin = ahead if self.targeted else -ahead
      return margin, wrong.astype(x.dtype)

    total = look(0)
    if self.eot > 1:
      total = jax.lax.fori_loop(
        1, self.eot, lambda k, t: jax.tree.map(jnp.add, t, look(k)), total
      )
    margin, wrong = total[0] / self.eot, total[1] > 0.5 * self.eot
    takes = (margin < state.margin) | wrong | (state.i == 0)
    best_x, best = search.where(takes, (x, margin), (state.x, state.margin))
    i, found = state.i + 1, state.found | wrong
    return dataclasses.replace(
      state,
      i=i,
      x=best_x,
      adv=search.where(wrong, x, state.adv),
      margin=best,
      found=found,
      done=(found & self.stop) | (i >= self.length),
      merit=-best,
    )

  def pick(self, job: Job, state: SquareState) -> Images:
    del job
    return search.where(state.found, state.adv, state.x)

  def _propose(self, job: Job, state: SquareState) -> Images:
    shape = _picture(job.images.shape[1:])
    start, move = (
      (_stripes, _move_linf)
      if self.threat.norm == "linf"
      else (_tiles, _move_lp)
    )

    def one(
      image: Float[Array, "*image"],
      x: Float[Array, "*image"],
      key: ImageKey,
      i: Int[Array, ""],
      eps: Float[Array, ""],
    ) -> Image:
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
  """Returns height, width and channels; axes that are missing have length 1."""
  if len(shape) > 3:
    raise ValueError(f"square wants images [h, w, c], got {shape}")
  height, width, channels = (*shape, 1, 1, 1)[:3]
  return height, width, channels


def _side(
  query: Int[Array, ""], shape: tuple[int, int, int], odd: bool
) -> Side:
  """Returns the side of the squares at a query, in pixels.

  Args:
    query: the number of the query, from 0.
    shape: the shape of an image.
    odd: whether the side is an odd number, at least 3, as for L2 and L1.
  """
  height, width, _ = shape
  halvings = sum((query > at).astype(np.int32) for at in HALVED_AT)
  area = P_INIT * height * width / 2.0**halvings
  side = jnp.round(jnp.sqrt(area)).astype(np.int32)
  if odd:
    side = jnp.maximum(side, 3)
    side = side + (side + 1) % 2
  return jnp.clip(side, 1, min(height, width))


def _draw_square(
  key: ImageKey, shape: tuple[int, ...], side: Side
) -> tuple[Int[Array, "h w"], Int[Array, "h w"], Bool[Array, "h w 1"]]:
  """Draws a square anywhere within an image of that shape.

  Returns:
    Each pixel's row and column in the square, and whether it is inside.
  """
  at = jax.random.uniform(key, (2,))
  free = jnp.array(shape[:2]) - side + 1
  corner = jnp.floor(at * free).astype(np.int32)
  rows = jnp.arange(shape[0])[:, None] - corner[0]
  columns = jnp.arange(shape[1])[None, :] - corner[1]
  rows, columns = jnp.broadcast_arrays(rows, columns)
  inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
  return rows, columns, inside[..., None]


def _project(threat: ThreatModel, x: Image, image: Image) -> Image:
  """Projects one image; in L1 into a ball that is smaller by a rounding."""
  if threat.norm == "l1":
    threat = dataclasses.replace(threat, eps=threat.eps * L1_INSIDE)
  return threat.project(x[None], image[None])[0]


def _stripes(threat: ThreatModel, key: ImageKey, image: Image) -> Image:
  """Starts in Linf with vertical stripes at the edge of the ball."""
  signs = jax.random.rademacher(key, (1, *image.shape[1:]), image.dtype)
  return jnp.clip(image + threat.eps * signs, threat.low, threat.high)


def _move_linf(
  threat: ThreatModel, key: ImageKey, image: Image, x: Image, side: Side
) -> Image:
  """Moves one square to the edge of the ball, each channel by one sign."""
  place, sign = jax.random.split(key)
  *_, inside = _draw_square(place, x.shape, side)
  signs = jax.random.rademacher(sign, (1, 1, x.shape[2]), x.dtype)
  # Twice eps: from one edge of the ball to the other.
  moved = x + jnp.where(inside, 2 * threat.eps * signs, 0)
  return _project(threat, moved, image)


def _tiles(threat: ThreatModel, key: ImageKey, image: Image) -> Image:
  """Starts in L2 and L1 with bumps of random signs, all over the image."""
  height, width, channels = image.shape
  side = max(min(height, width) // 5, 1)
  grid = (height // side, width // side)
  turn, sign = jax.random.split(key)
  signs = jax.random.rademacher(sign, (*grid, channels), image.dtype)
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
  if threat.norm == "l2":
    length = jnp.sqrt(jnp.square(offset).sum())
    eps = jnp.asarray(threat.eps, image.dtype)
    offset = eps * offset / (length + TINY)
  return _project(threat, image + offset, image)


def _move_lp(
  threat: ThreatModel, key: ImageKey, image: Image, x: Image, side: Side
) -> Image:
  """Moves the offset of one square to another, where it forms a bump.

  The bump also takes the part of the radius that the offset does not use yet.
  """
  to_key, off_key, turn, sign = jax.random.split(key, 4)
  down, across, to = _draw_square(to_key, x.shape, side)
  *_, off = _draw_square(off_key, x.shape, side)
  turned = jax.random.bernoulli(turn)
  down, across = (
    jnp.where(turned, across, down),
    jnp.where(turned, down, across),
  )
  size = max(x.shape[:2])
  bump = _bump(threat.norm, down, across, side, size).astype(x.dtype)
  signs = jax.random.rademacher(sign, (1, 1, x.shape[2]), x.dtype)
  offset, channels = x - image, x.shape[2]

  def length(
    values: Image, axes: tuple[int, ...] = (0, 1)
  ) -> Float[Array, "1 1 #c"]:
    """The norm of each channel, or over all three axes of the whole."""
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
  if threat.norm == "l2":
    offset = offset * (threat.eps / (TINY + length(offset, (0, 1, 2))))
  return _project(threat, image + offset, image)


def _bump(
  norm: str, down: Indices, across: Indices, side: int | Side, size: int
) -> Float[Array, "h w"]:
  """Returns a square's two halves, one up and one down, of unit length in all.

  Args:
    norm: the norm that the length is measured in, `l2` or `l1`.
    down: each pixel's row in the square; values outside of it mean nothing.
    across: each pixel's column in the square.
    side: the side of the square.
    size: an upper bound of the side, known when compiled.
  """
  upper = side // 2
  values = jnp.where(
    down < upper,
    _pyramid(norm, down, across, upper, side, size),
    -_pyramid(norm, down - upper, across, side - upper, side, size),
  )
  halves = jnp.where(upper > 0, 2, 1)  # each of unit length
  return values / (jnp.sqrt(halves) if norm == "l2" else halves)


def _pyramid(
  norm: str,
  down: Indices,
  across: Indices,
  height: int | Side,
  width: int | Side,
  size: int,
) -> Float[Array, "h w"]:
  """Returns steps that rise towards the middle of a rectangle, of unit length.

  Args:
    norm: as in `_bump`, like `size`.
    down: each pixel's row in the rectangle.
    across: each pixel's column.
    height: the height of the rectangle.
    width: its width.
    size: an upper bound of both.
  """
  power = 2 if norm == "l2" else 4
  heights = [0.0] + [1 / (m + 1) ** power for m in range(size + 1)]
  rings = jnp.asarray(np.cumsum(heights))
  steps = jnp.maximum(height // 2, width // 2) + 1

  def at(
    down: Int[Array | np.ndarray, "#h #w"],
    across: Int[Array | np.ndarray, "#h #w"],
  ) -> Float[Array, "h w"]:
    ring = jnp.maximum(
      jnp.abs(down - height // 2), jnp.abs(across - width // 2)
    )
    return rings[steps] - rings[jnp.clip(ring, 0, size + 1)]

  rows, columns = jnp.arange(size)[:, None], jnp.arange(size)[None, :]
  values = jnp.where((rows < height) & (columns < width), at(rows, columns), 0)
  length = jnp.sqrt(jnp.square(values).sum()) if norm == "l2" else values.sum()
  return at(down, across) / jnp.maximum(length, TINY)
