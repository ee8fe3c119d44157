"""A function of images on the devices: attacked, and judged.

What comes out for an image does not depend on which images it shares a batch
with, nor on how many devices there are.
"""

import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from roli_jax import keys, losses, sharding
from roli_jax.evaluate import tracing

SMALLEST = 8  # images a device: smaller batches take other kernels
DRAWS = 20  # of a randomised function, to judge an image


@dataclasses.dataclass(frozen=True)
class Classifier:
  """A function `(params, images, keys) -> logits` with all that it needs.

  Attributes:
    programs: the function, and what is compiled for it.
    params: its first argument, on every device.
    mesh: the devices, along `data`.
    batch_size: images at once, rounded up to what the devices divide.
    stochastic: whether it draws from its keys; then it is judged by the mean
      margin and the majority of 20 draws.
    dtype: of the attacks' passes, `bfloat16` or None for what the function
      computes in. Judged is always as the function computes, its products in
      float32 at highest precision.
    seed: decides the judge's draws, an int >= 0.
  """

  programs: tracing.Programs
  params: Any
  mesh: Mesh
  batch_size: int
  stochastic: bool = False
  dtype: str | None = None
  seed: int = 0

  @property
  def unit(self) -> int:
    """What the devices divide into batches that are not too small."""
    return SMALLEST * self.mesh.size

  @property
  def sizes(self) -> tuple[int, ...]:
    """The sizes of batches that programs are compiled for, smallest first.

    On a CPU idle eights cost nothing, so one size will do for searches.
    """
    large = self.unit * -(-self.batch_size // self.unit)
    return tuple(sorted({self._part(large, k) for k in (1, 4, 16)}))

  def _part(self, large, k):
    return self.unit * -(-large // (k * self.unit))

  def judge(
    self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether images are classified as labelled, margins, and logits."""
    parts: list[Any] = []
    key = keys.stream(keys.root(self.seed), "judge")
    arrays = (images, labels, indices.astype(np.uint32))
    for _, real, bucket in self._buckets(*arrays):
      draws = DRAWS if self.stochastic else 1
      judge = self.programs.compiled(_judge, static_argnums=(0, 1))
      out = judge(self.mesh, draws, self.params, key, *bucket)
      parts.append([x[real] for x in sharding.fetch(out)])
    right, margin, logits = map(np.concatenate, zip(*parts, strict=True))
    return right, margin, logits

  def craft(
    self, attack: Any, key: Any, images, labels, indices, eps
  ) -> Iterator[tuple[slice, np.ndarray, int]]:
    """What an attack of one call makes of each bucket of images.

    Yields:
      The rows of a bucket, the images found, and how many rows were padding.
    """
    arrays = (images, labels, indices.astype(np.uint32), eps)
    for rows, real, bucket in self._buckets(*arrays):
      craft = self.programs.compiled(_attack, static_argnums=(0, 1))
      found = craft(self.mesh, self.dtype, attack, self.params, key, *bucket)
      yield rows, sharding.fetch(found)[real], int((~real).sum())

  def lower(self, attack: Any, shape: tuple[int, ...]) -> jax.stages.Lowered:
    """The program of `craft`, not compiled; params may be shapes.

    Args:
      attack: of one call.
      shape: (h, w, c) of an image.
    """
    craft = self.programs.compiled(_attack, static_argnums=(0, 1))
    rows = sharding.split(self.mesh)

    def array(dtype, *dims):
      full = (self.sizes[-1], *dims)
      return jax.ShapeDtypeStruct(full, dtype, sharding=rows)

    return craft.lower(
      self.mesh,
      self.dtype,
      attack,
      self.params,
      keys.root(self.seed),
      array(jnp.float32, *shape),
      array(jnp.int32),
      array(jnp.uint32),
      array(jnp.float32),
    )

  def slopes(
    self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gradient that attacks climb: is it of use, and how long is it?

    Returns:
      [n] each: where values of it are not finite, where all of them are 0, and
      its L1 norm without those that are not finite.
    """
    parts: list[Any] = []
    key = keys.stream(keys.root(self.seed), "slopes")
    arrays = (images, labels, indices.astype(np.uint32))
    for _, real, bucket in self._buckets(*arrays):
      slopes = self.programs.compiled(_slopes, static_argnums=(0, 1))
      out = slopes(self.mesh, self.dtype, self.params, key, *bucket)
      parts.append([x[real] for x in sharding.fetch(out)])
    strange, flat, length = map(np.concatenate, zip(*parts, strict=True))
    return strange, flat, length

  def _buckets(self, *arrays) -> Iterator[tuple[slice, np.ndarray, Any]]:
    """The arrays in pieces of two sizes; the last is padded with copies."""
    large = self.sizes[-1]
    small = self.sizes[max(0, len(self.sizes) - 2)]
    start, n = 0, len(arrays[0])
    while start < n:
      size = large if n - start >= large else small
      at = start + np.arange(size)
      piece = tuple(a[np.minimum(at, n - 1)] for a in arrays)
      rows = slice(start, min(start + size, n))
      yield rows, at < n, sharding.spread(piece, self.mesh)
      start += size


def make(
  logits_fn: Callable[..., Any],
  params: Any,
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
    params: its first argument; None where it takes none.
    shape: (h, w, c) of an image.
    batch_size: images at once.
    stochastic: whether it takes a key last.
    dtype: the precision of the attacks' passes; None: the function's own.
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


def lowered(fn: Callable[..., Any], dtype: str | None) -> Callable[..., Any]:
  """The function on params and images of that dtype; logits in float32."""
  if dtype is None:
    return fn

  def cast(tree):
    return jax.tree.map(
      lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
      tree,
    )

  def low(params, images, image_keys):
    return fn(cast(params), cast(images), image_keys)

  return low


def _attack(fn, mesh, dtype, attack, params, key, images, labels, indices, eps):
  def adversarial(whole, images, labels, indices, eps):
    attack, params, key = whole
    threat = dataclasses.replace(attack.threat, eps=eps)
    image_keys = keys.per_image(key, indices)
    # One draw of a randomised function for each image, which is climbed.
    return dataclasses.replace(attack, threat=threat)(
      lambda x: lowered(fn, dtype)(params, x, image_keys),
      images,
      labels,
      image_keys,
    )

  parts = (images, labels, indices, eps)
  return map_in_eights(adversarial, mesh, (attack, params, key), parts)


def _slopes(fn, mesh, dtype, params, key, images, labels, indices):
  """See `Classifier.slopes`."""

  def looked_at(whole, images, labels, indices):
    params, key = whole
    image_keys = keys.per_image(key, indices)

    def climb(x):
      logits = lowered(fn, dtype)(params, x, image_keys)
      return losses.SURROGATES["ce"].climb(logits, labels).sum()

    grads = jax.grad(climb)(images).reshape(len(images), -1)
    known = jnp.isfinite(grads)
    length = jnp.abs(jnp.where(known, grads, 0)).sum(1)
    return ~known.all(1), (grads == 0).all(1), length

  return map_in_eights(
    looked_at, mesh, (params, key), (images, labels, indices)
  )


def _judge(fn, mesh, draws, params, key, images, labels, indices):
  """Whether each image is classified as labelled, margins and logits."""

  def judged(whole, images, labels, indices):
    params, key = whole
    image_keys = keys.per_image(key, indices)

    def draw(k):
      own = keys.fold(image_keys, k)
      with jax.default_matmul_precision("highest"):
        logits = fn(params, images, own)
      right = losses.correct(logits, labels).astype(jnp.float32)
      return right, -losses.margin(logits, labels), logits

    if draws == 1:
      right, *rest = draw(0)
      return right > 0.5, *rest
    drawn = jax.lax.map(draw, jnp.arange(draws))
    right, *rest = (x.mean(0) for x in drawn)
    return right > 0.5, *rest

  return map_in_eights(judged, mesh, (params, key), (images, labels, indices))


def runs_on_cpu(mesh: Mesh) -> bool:
  """Whether the devices are a CPU's; they need not be those of this machine."""
  return mesh.devices.flat[0].platform == "cpu"


def map_in_eights(fn, mesh: Mesh, whole, parts):
  """`fn(whole, *parts)` on each device's share of the rows of `parts`.

  On a CPU for eight rows at a time: XLA's kernels for a CPU round differently
  at different sizes of a batch. At one size, an image's result is the same
  bits whatever it is batched with.
  """
  on_cpu = runs_on_cpu(mesh)

  def local(whole, *parts):
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
