"""Robust accuracy of any function, image by image.

An attack never judges itself: what it returns is classified by a fresh forward
pass at highest precision, and its distance is measured in float64 on the host.
Each image's result depends on that image, the attack and the seed, not on
which images it shares a batch with.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from roli_jax import attacks, keys, losses, metrics, progress, sharding
from roli_jax.threat import ThreatModel

SMALLEST = 8  # images a device: smaller batches take other kernels


@dataclasses.dataclass(frozen=True)
class Result:
  """What became of each image; NumPy arrays, one entry an image.

  Attributes:
    clean: whether the clean image is classified as labelled.
    robust: whether it is, and so are all images that the attack found.
    broken_by: "" where robust, "clean" where misclassified before any attack,
      else the attack's name.
    distance: of the adversarial image where the attack broke it; 0 where the
      clean image is misclassified, inf where it is robust.
    margin: the label's logit minus the best other at the last verified point.
    adv: the adversarial image where the attack broke it, else the clean one.
    invalid: whether the attack left the ball or the box, which never counts
      as a break.
    passes: forward and backward passes of single images, padding left out.
    seconds: of it all.
  """

  clean: np.ndarray
  robust: np.ndarray
  broken_by: np.ndarray
  distance: np.ndarray
  margin: np.ndarray
  adv: np.ndarray
  invalid: np.ndarray
  passes: dict[str, int]
  seconds: float

  def summary(self) -> dict[str, Any]:
    """Totals as plain values; rates come with 95% Wilson intervals."""

    def rate(flags):
      low, high = metrics.wilson(int(flags.sum()), len(flags))
      return {"value": float(flags.mean()), "low": low, "high": high}

    names, counts = np.unique(self.broken_by, return_counts=True)
    outside = np.flatnonzero(self.invalid).tolist()
    return {
      "n": len(self.clean),
      "clean": rate(self.clean),
      "robust": rate(self.robust),
      "broken_by": dict(zip(names.tolist(), counts.tolist(), strict=True)),
      "passes": self.passes,
      "seconds": self.seconds,
      "checks": {
        "ball_and_box": {
          "verdict": "fail" if outside else "pass",
          "images": outside,
        }
      },
    }


def run(
  logits_fn: Callable[..., Any],
  images: np.ndarray,
  labels: np.ndarray,
  attack: attacks.Attack | None,
  *,
  params: Any = None,
  seed: int = 0,
  batch_size: int = 128,
  indices: np.ndarray | None = None,
) -> Result:
  """Attacks each image that is classified as labelled, and judges the result.

  Args:
    logits_fn: `(images) -> logits`, or `(params, images) -> logits` if params
      are given; then other params of the same shapes compile nothing.
    images: [n, h, w, c], floats in the box of the threat model.
    labels: [n], integers within the logits' width.
    attack: None measures clean accuracy alone.
    params: of `logits_fn`, a tree of arrays.
    seed: of the attack's noise.
    batch_size: images attacked at once.
    indices: who each image is, 0..n-1 by default; keys are folded from (seed,
      index, attack) and from nothing else.

  Raises:
    ValueError: images, labels or indices that can't be meant.
  """
  started = time.perf_counter()
  images, labels = np.asarray(images), np.asarray(labels)
  indices = np.arange(len(images)) if indices is None else np.asarray(indices)
  if params is None:
    logits_fn, params = _with_params(logits_fn), ()
  on = _On(logits_fn, params, sharding.mesh(), batch_size)
  _check_inputs(on, images, labels, indices, attack)
  images = images.astype(np.float32)
  n = len(images)
  clean, margin = on.judge(images, labels)
  result = Result(
    clean=clean,
    robust=clean.copy(),
    broken_by=np.where(clean, "", "clean").astype(object),
    distance=np.where(clean, np.inf, 0.0),
    margin=margin,
    adv=images.copy(),
    invalid=np.zeros(n, bool),
    passes={"forward": n, "backward": 0},
    seconds=0.0,
  )
  if attack is not None:
    alive = np.flatnonzero(clean)
    eps = np.broadcast_to(np.float32(attack.threat.eps), n)
    key = keys.stream(keys.root(seed), attack.name)
    found = on.attack(
      attack, key, images[alive], labels[alive], indices[alive], eps[alive]
    )
    _count(result, attack, alive, found, *on.judge(found, labels[alive]))
  return dataclasses.replace(
    result,
    broken_by=result.broken_by.astype(str),
    seconds=time.perf_counter() - started,
  )


def _count(result, attack, alive, found, right, margin) -> None:
  """Enters what an attack found for the images that were alive.

  What is outside the ball or the box is no break; it is reported.
  """
  far, outside = _measure(attack.threat, found, result.adv[alive], alive)
  broken = ~right & ~outside
  hit = alive[broken]
  result.robust[hit] = False
  result.adv[hit] = found[broken]
  result.distance[hit] = far[broken]
  result.broken_by[hit] = attack.name
  result.invalid[alive] = outside
  result.margin[alive[~outside]] = margin[~outside]
  forward, backward = attack.passes
  result.passes["forward"] += len(alive) * (forward + 1)
  result.passes["backward"] += len(alive) * backward


@dataclasses.dataclass(frozen=True)
class _On:
  """A function of images on the devices, called on arrays of any length."""

  logits_fn: Callable[..., Any]
  params: Any
  mesh: Mesh
  batch_size: int

  def __post_init__(self):
    placed = sharding.replicate(self.params, self.mesh)
    object.__setattr__(self, "params", placed)

  def judge(self, images, labels) -> tuple[np.ndarray, np.ndarray]:
    """Whether each image is classified as labelled, and by which margin."""
    right = np.zeros(len(images), bool)
    margin = np.zeros(len(images), np.float32)
    for rows, real, bucket in self._buckets(images, labels):
      judged = _judge(self.logits_fn, self.mesh, self.params, *bucket)
      right[rows], margin[rows] = (np.asarray(x)[real] for x in judged)
    return right, margin

  def attack(self, attack, key, images, labels, indices, eps) -> np.ndarray:
    """What the attack makes of each image."""
    found = images.copy()
    arrays = (images, labels, indices.astype(np.uint32), eps)
    with progress.bar(attack.name, len(images)) as update:
      for rows, real, bucket in self._buckets(*arrays):
        adv = _attack(
          self.logits_fn, self.mesh, attack, self.params, key, *bucket
        )
        found[rows] = np.asarray(adv)[real]
        update(int(real.sum()))
    return found

  def _buckets(self, *arrays) -> Iterator[tuple[slice, np.ndarray, Any]]:
    """The arrays in pieces of two sizes, a batch and a quarter of it.

    The last piece is padded with copies of its last row.

    Yields:
      The rows of a piece, which of its entries are real, and its arrays on
      the devices.
    """
    unit = SMALLEST * self.mesh.size
    large = unit * -(-self.batch_size // unit)
    small = unit * -(-large // (4 * unit))
    start, n = 0, len(arrays[0])
    while start < n:
      size = large if n - start >= large else small
      at = start + np.arange(size)
      piece = tuple(a[np.minimum(at, n - 1)] for a in arrays)
      rows = slice(start, min(start + size, n))
      yield rows, at < n, sharding.put(piece, self.mesh)
      start += size


@functools.lru_cache(maxsize=64)
def _with_params(logits_fn):
  """The function with params that it ignores; the same one for the same."""
  return lambda _, images: logits_fn(images)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attack(logits_fn, mesh, attack, params, key, images, labels, indices, eps):
  def adversarial(whole, images, labels, indices, eps):
    attack, params, key = whole
    threat = dataclasses.replace(attack.threat, eps=eps)
    return dataclasses.replace(attack, threat=threat)(
      functools.partial(logits_fn, params),
      images,
      labels,
      keys.per_image(key, indices),
    )

  parts = (images, labels, indices, eps)
  return _by_eights(adversarial, mesh, (attack, params, key), parts)


@functools.partial(jax.jit, static_argnums=0)  # its shapes are remembered
def _logits(logits_fn, params, images):
  return logits_fn(params, images)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _judge(logits_fn, mesh, params, images, labels):
  """Whether each image is classified as labelled, and by which margin."""

  def judged(params, images, labels):
    with jax.default_matmul_precision("highest"):
      logits = logits_fn(params, images).astype(jnp.float32)
    return losses.correct(logits, labels), -losses.margin(logits, labels)

  return _by_eights(judged, mesh, params, (images, labels))


def _by_eights(fn, mesh, whole, parts):
  """`fn(whole, *parts)`, on a CPU for eight images at a time on each device.

  XLA's kernels for a CPU round differently at different sizes of a batch. At
  one size, an image's result is the same bits whatever it is batched with.
  """
  if jax.default_backend() != "cpu":
    return fn(whole, *parts)

  def local(whole, *parts):
    eights = [x.reshape(-1, SMALLEST, *x.shape[1:]) for x in parts]
    out = jax.lax.map(lambda eight: fn(whole, *eight), eights)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)

  images = PartitionSpec("data")
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(PartitionSpec(), *(images for _ in parts)),
    out_specs=images,
    check_vma=False,
  )(whole, *parts)


def _measure(
  threat: ThreatModel, found: np.ndarray, clean: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Distances in float64, and whether ball or box were left.

  Beside a millionth of eps, what is forgiven is one rounding of a float32
  pixel, summed over the image in the norm: an image that is clipped to the
  ball in float32 may lie that much outside.
  """
  adv, origin = found.astype(np.float64), clean.astype(np.float64)
  far = np.asarray(threat.distance(adv, origin), np.float64)
  size = int(np.prod(clean.shape[1:]))
  rounding = {"linf": 1.0, "l2": size**0.5, "l1": size}[threat.norm] * 2.0**-24
  eps = np.asarray(threat.eps, np.float64)
  eps = eps[rows] if eps.ndim else eps
  valid = (adv >= threat.low) & (adv <= threat.high)
  inside = valid.reshape(len(adv), -1).all(1)
  return far, ~(inside & (far <= eps * (1 + 1e-6) + rounding))


def _check_inputs(on, images, labels, indices, attack):
  n = len(images)
  if n == 0 or images.ndim < 2:
    raise ValueError(f"expected images [n, h, w, c], got {images.shape}")
  if not np.issubdtype(images.dtype, np.floating):
    raise ValueError(
      f"expected floating-point images in [0, 1], got {images.dtype};"
      " divide by 255?"
    )
  low, high = (attack.threat.low, attack.threat.high) if attack else (0, 1)
  if not np.all((images >= low) & (images <= high)):
    raise ValueError(
      f"expected images in [{low}, {high}], got values in"
      f" [{images.min()}, {images.max()}]; normalise inside the function"
    )
  for name, values in (("labels", labels), ("indices", indices)):
    if values.shape != (n,) or not np.issubdtype(values.dtype, np.integer):
      raise ValueError(
        f"expected {name} as {n} integers, got {values.dtype} {values.shape}"
      )
  eps = np.asarray(attack.threat.eps) if attack else np.zeros(())
  if eps.shape not in ((), (n,)):
    raise ValueError(f"expected one eps, or {n} of them, got {eps.shape}")
  piece = jax.ShapeDtypeStruct((SMALLEST, *images.shape[1:]), jnp.float32)
  out = jax.eval_shape(
    functools.partial(_logits, on.logits_fn), on.params, piece
  )
  if getattr(out, "ndim", None) != 2 or out.shape[0] != SMALLEST:
    raise ValueError(
      f"expected logits [{SMALLEST}, classes] for {SMALLEST} images, got"
      f" {getattr(out, 'shape', type(out).__name__)}"
    )
  if labels.min() < 0 or labels.max() >= out.shape[1]:
    raise ValueError(
      f"expected labels in [0, {out.shape[1]}), the width of the logits, got"
      f" {labels.min()} to {labels.max()}"
    )
