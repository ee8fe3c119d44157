"""A function of images on the devices, which attacks climb and a judge asks.

The result for an image does not depend on which images it shares a batch with,
nor on how many devices there are.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.stages import Lowered

from roli_jax import keys, losses, sharding
from roli_jax.attacks import Attack
from roli_jax.evaluate import tracing
from roli_jax.evaluate.tracing import KeyedLogits
from roli_jax.types import Array, Bool, Float, Images, Int, Key, Logits, PyTree

SMALLEST = 8  # images a device: smaller batches take other kernels
DRAWS = 20  # of a randomised function, to judge an image


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Examples:
  """Images to attack or to judge: NumPy arrays, or the devices' own.

  (Their shapes stand here and not in annotations: JAX puts other things than
  arrays in the fields of a tree.)

  Attributes:
    images: [n, h, w, c], float32, in the box of the threat model.
    labels: [n], integers, the images' classes.
    indices: [n], integers: who each image is. Its keys are folded from this.
  """

  images: Any
  labels: Any
  indices: Any

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, rows: slice | np.ndarray) -> "Examples":
    """The examples at these rows, or where the mask is True."""
    return jax.tree.map(lambda x: x[rows], self)


@dataclasses.dataclass(frozen=True)
class Classifier:
  """A function `(params, images, keys) -> logits` with all that it needs.

  Attributes:
    programs: the function, and what is compiled for it.
    params: its first argument, on every device.
    mesh: the devices, along `data`.
    batch_size: images at once, >= 1, rounded up to what the devices divide.
    stochastic: whether it draws from its keys; then it is judged by the mean
      margin and the majority of 20 draws.
    dtype: what the attacks' passes compute in: `bfloat16`, `float32`, or None
      for the function's own. The judge's products are always in float32 at
      highest precision.
    seed: decides the judge's draws, an int >= 0.
    targeted: whether labels are targets, for the judge.
  """

  programs: tracing.Programs
  params: PyTree
  mesh: Mesh
  batch_size: int
  stochastic: bool = False
  dtype: str | None = None
  seed: int = 0
  targeted: bool = False

  @property
  def sizes(self) -> tuple[int, ...]:
    """The sizes of batches that programs are compiled for, smallest first.

    Multiples of eight rows a device: the batch size, a quarter and a 16th. On a
    CPU, where eight rows of which none counts cost nothing, the first alone.
    """
    unit = SMALLEST * self.mesh.size
    large = unit * -(-self.batch_size // unit)
    parts = (1,) if runs_on_cpu(self.mesh) else (1, 4, 16)
    return tuple(sorted({unit * -(-large // (k * unit)) for k in parts}))

  def places(self, size: int, count: int) -> np.ndarray:
    """Where so many rows stand in a batch, int [count].

    By eights, each device in turn: few rows are spread over all devices.
    """
    eights = np.arange(size).reshape(self.mesh.size, -1, SMALLEST)
    return eights.swapaxes(0, 1).ravel()[:count]

  def judge(
    self, examples: Examples
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether images are classified as labelled, margins, and logits.

    If labels are targets, whether images are classified otherwise.

    Returns:
      bool [n]; the label's logit minus the best other, or if it is a target the
      best other minus that, [n]; logits [n, k].
    """
    draws = DRAWS if self.stochastic else 1
    at_label, margin, logits = self._on_all(_judge, draws, "judge", examples)
    if self.targeted:
      return ~at_label, -margin, logits
    return at_label, margin, logits

  def slopes(
    self, examples: Examples
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gradient that attacks climb: is it of use, and how long is it?

    Returns:
      [n] each: whether any value of it is not finite, whether all of them are
      0, and its L1 norm without those that are not finite.
    """
    return self._on_all(_slopes, self.dtype, "slopes", examples)

  def craft(
    self,
    attack: Attack,
    key: Key[Array, ""],
    examples: Examples,
    eps: np.ndarray,
  ) -> Iterator[tuple[slice, np.ndarray, int]]:
    """Runs an attack of one call on a bucket of images after the other.

    Args:
      attack: one that is no search.
      key: its random key, from which each image's is folded.
      examples: the images that it starts from.
      eps: the radius of each image, float32 [n].

    Yields:
      The rows of a bucket, the images found, and how many rows were padding.
    """
    whole = (attack, self.params, key)
    return self._outputs(_attack, self.dtype, whole, examples, eps)

  def lower(self, attack: Attack, shape: tuple[int, ...]) -> Lowered:
    """The program of `craft` for the largest batch, not compiled.

    Args:
      attack: one that is no search.
      shape: (h, w, c) of an image. The params may be shapes too.
    """
    in_eights = self.programs.compiled(_in_eights, static_argnums=(0, 1, 2))
    rows = sharding.split(self.mesh)

    def array(dtype: Any, *dims: int) -> jax.ShapeDtypeStruct:
      full = (self.sizes[-1], *dims)
      return jax.ShapeDtypeStruct(full, dtype, sharding=rows)

    examples = Examples(
      array(jnp.float32, *shape), array(jnp.int32), array(jnp.uint32)
    )
    whole = (attack, self.params, keys.root(self.seed))
    parts = (examples, array(jnp.float32))
    counted = array(jnp.bool_)
    return in_eights.lower(
      self.mesh, _attack, self.dtype, whole, parts, counted
    )

  def _on_all(
    self,
    program: Callable[..., Any],
    setting: int | str | None,
    purpose: str,
    examples: Examples,
  ) -> Any:
    """What a program returns for all examples, as NumPy arrays.

    Args:
      program: `_judge` or `_slopes`.
      setting: its second argument.
      purpose: the name of the random stream that it draws from.
      examples: what it is run on.
    """
    whole = (self.params, keys.stream(keys.root(self.seed), purpose))
    outputs = self._outputs(program, setting, whole, examples)
    columns = zip(*(found for _, found, _ in outputs), strict=True)
    return tuple(map(np.concatenate, columns))

  def _outputs(
    self,
    program: Callable[..., Any],
    setting: int | str | None,
    whole: PyTree,
    examples: Examples,
    *others: np.ndarray,
  ) -> Iterator[tuple[slice, Any, int]]:
    """Runs a program on the rows, in pieces of the two largest sizes.

    The last piece is filled up with copies of the last row.

    Yields:
      The rows of a piece, what the program returns for them, as NumPy arrays,
      and how many rows that were run were padding.
    """
    in_eights = self.programs.compiled(_in_eights, static_argnums=(0, 1, 2))
    indices = examples.indices.astype(np.uint32)  # what keys are folded from
    examples = dataclasses.replace(examples, indices=indices)
    small, large = self.sizes[-2:][0], self.sizes[-1]
    start, n = 0, len(examples)
    while start < n:
      size = large if n - start >= large else small
      stop = min(start + size, n)
      places = self.places(size, stop - start)
      at, counted = np.full(size, stop - 1), np.zeros(size, bool)
      at[places], counted[places] = np.arange(start, stop), True
      piece = (examples[at], *(x[at] for x in others))
      *parts, counted = sharding.spread((*piece, counted), self.mesh)
      found = in_eights(
        self.mesh, program, setting, whole, tuple(parts), counted
      )
      real = jax.tree.map(
        lambda x, places=places: x[places], sharding.fetch(found)
      )
      eights = -(-len(places) // SMALLEST)
      ran = eights * SMALLEST if runs_on_cpu(self.mesh) else size
      yield slice(start, stop), real, ran - len(places)
      start = stop


def make(
  logits_fn: Callable[..., Any],
  params: PyTree,
  shape: tuple[int, ...],
  batch_size: int,
  *,
  stochastic: bool = False,
  dtype: str | None = None,
  seed: int = 0,
) -> Classifier:
  """A user's function, `([params,] images[, key]) -> logits`, on all devices.

  Args:
    logits_fn: the function.
    params: its first argument, a tree of arrays; None where it takes none.
    shape: (h, w, c) of an image.
    batch_size: images at once, >= 1.
    stochastic: whether it takes a key last.
    dtype: the precision of the attacks' passes, `bfloat16` or `float32`; None:
      the function's own.
    seed: decides the judge's draws, an int >= 0.

  Raises:
    ValueError: a batch size below 1, an unknown dtype, params that are no
      arrays, or a function that gives no logits or that JAX can't trace.
  """
  batch_size, seed = operator.index(batch_size), operator.index(seed)
  if batch_size < 1:
    raise ValueError(f"batch_size must be >= 1, got {batch_size}")
  if dtype not in (None, "bfloat16", "float32"):
    raise ValueError(f"dtype is None, 'bfloat16' or 'float32', got {dtype!r}")
  mesh = sharding.mesh()
  programs = tracing.programs(
    logits_fn, params, (SMALLEST, *shape), stochastic=stochastic
  )
  placed = sharding.replicate(() if params is None else params, mesh)
  return Classifier(programs, placed, mesh, batch_size, stochastic, dtype, seed)


def lowered(fn: KeyedLogits, dtype: str | None) -> KeyedLogits:
  """The function on params and images of that dtype; logits in float32."""
  if dtype is None:
    return fn

  def cast(tree: PyTree) -> PyTree:
    return jax.tree.map(
      lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
      tree,
    )

  return lambda params, images, image_keys: fn(
    cast(params), cast(images), image_keys
  )


# The programs: each takes the function, a setting that is compiled into it,
# what all images share, and eight images or more.


def _attack(
  fn: KeyedLogits,
  dtype: str | None,
  whole: tuple[Any, PyTree, Key[Array, ""]],
  examples: Examples,
  eps: Float[Array, " b"],
) -> Images:
  """The images that an attack of one call finds; `whole` has it first."""
  attack, params, key = whole
  threat = dataclasses.replace(attack.threat, eps=eps)
  # One draw of a randomised function for each image, which is climbed.
  image_keys = keys.per_image(key, examples.indices)
  return dataclasses.replace(attack, threat=threat)(
    lambda x: lowered(fn, dtype)(params, x, image_keys),
    examples.images,
    examples.labels,
    image_keys,
  )


def _slopes(
  fn: KeyedLogits,
  dtype: str | None,
  whole: tuple[PyTree, Key[Array, ""]],
  examples: Examples,
) -> tuple[Bool[Array, " b"], Bool[Array, " b"], Float[Array, " b"]]:
  """See `Classifier.slopes`."""
  params, key = whole
  image_keys = keys.per_image(key, examples.indices)

  def climb(x: Images) -> Float[Array, ""]:
    logits = lowered(fn, dtype)(params, x, image_keys)
    return losses.SURROGATES["ce"].climb(logits, examples.labels).sum()

  grads = jax.grad(climb)(examples.images).reshape(len(examples), -1)
  known = jnp.isfinite(grads)
  length = jnp.abs(jnp.where(known, grads, 0)).sum(1)
  return ~known.all(1), (grads == 0).all(1), length


def _judge(
  fn: KeyedLogits,
  draws: int,
  whole: tuple[PyTree, Key[Array, ""]],
  examples: Examples,
) -> tuple[Bool[Array, " b"], Float[Array, " b"], Logits]:
  """See `Classifier.judge`."""
  params, key = whole
  image_keys = keys.per_image(key, examples.indices)

  def draw(
    k: int | Int[Array, ""],
  ) -> tuple[Float[Array, " b"], Float[Array, " b"], Logits]:
    draw_keys = keys.fold(image_keys, k)
    with jax.default_matmul_precision("highest"):
      logits = fn(params, examples.images, draw_keys)
    right = losses.correct(logits, examples.labels).astype(jnp.float32)
    return right, -losses.margin(logits, examples.labels), logits

  if draws == 1:
    right, margin, logits = draw(0)
  else:
    drawn = jax.lax.map(draw, jnp.arange(draws))
    right, margin, logits = (x.mean(0) for x in drawn)
  return right > 0.5, margin, logits


def _in_eights(
  fn: KeyedLogits,
  mesh: Mesh,
  program: Callable[..., Any],
  setting: int | str | None,
  whole: PyTree,
  parts: tuple[PyTree, ...],
  counted: Bool[Array, " b"],
) -> Any:
  """A program on each device's share of the rows of `parts` that count."""

  def run(whole: PyTree, counted: Bool[Array, " b"], *parts: PyTree) -> Any:
    found = functools.partial(program, fn, setting, whole, *parts)
    if not runs_on_cpu(mesh):
      return found()
    nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(found))
    return jax.lax.cond(counted.any(), found, lambda: nothing)

  return map_in_eights(run, mesh, whole, (counted, *parts))


def runs_on_cpu(mesh: Mesh) -> bool:
  """Whether the devices are a CPU's; they need not be those of this machine."""
  return mesh.devices.flat[0].platform == "cpu"


def map_in_eights(
  fn: Callable[..., Any], mesh: Mesh, whole: PyTree, parts: tuple[PyTree, ...]
) -> Any:
  """`fn(whole, *parts)` on each device's share of the rows of `parts`.

  On a CPU for eight rows at a time: XLA's kernels for a CPU round differently
  at different sizes of a batch. At one size, an image's result is the same
  bits whatever it is batched with.

  Args:
    fn: takes `whole` and a share of each part, and returns arrays that have
      one row for each of theirs.
    mesh: the devices, along `data`.
    whole: a tree of arrays that every device sees.
    parts: trees of arrays of n rows each.
  """
  on_cpu = runs_on_cpu(mesh)

  def local(whole: PyTree, *parts: PyTree) -> Any:
    size = SMALLEST if on_cpu else len(jax.tree.leaves(parts)[0])
    split = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), parts)
    out = jax.lax.map(lambda part: fn(whole, *part), split)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)

  rows = PartitionSpec("data")
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(PartitionSpec(), *(rows for _ in parts)),
    out_specs=rows,
    check_vma=False,
  )(whole, *parts)
