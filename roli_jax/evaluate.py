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
  if indices is None:
    indices = np.arange(len(images))
  indices = np.asarray(indices)
  mesh = sharding.mesh()
  if params is None:
    logits_fn, params = _with_params(logits_fn), ()
  params = sharding.replicate(params, mesh)
  _check_inputs(logits_fn, params, images, labels, indices, attack)
  images = images.astype(np.float32)

  def judge(points, rows):
    outs = []
    for real, (x, y) in _buckets(mesh, batch_size, points, labels[rows]):
      judged = _judge(logits_fn, params, x, y)
      outs.append([np.asarray(values)[real] for values in judged])
    if not outs:
      return np.zeros(0, bool), np.zeros(0, np.float32)
    right, margin = zip(*outs, strict=True)
    return np.concatenate(right), np.concatenate(margin)

  n = len(images)
  clean, margin = judge(images, np.arange(n))
  robust, adv = clean.copy(), images.copy()
  broken_by = np.where(clean, "", "clean").astype(object)
  distance = np.where(clean, np.inf, 0.0)
  invalid = np.zeros(n, bool)
  passes = {"forward": n, "backward": 0}
  if attack is not None:
    alive = np.flatnonzero(clean)
    found = images[alive].copy()
    key = keys.stream(keys.root(seed), attack.name)
    jobs = _buckets(
      mesh,
      batch_size,
      images[alive],
      labels[alive],
      indices[alive].astype(np.uint32),
      np.broadcast_to(np.float32(attack.threat.eps), n)[alive],
    )
    done = 0
    with progress.bar(attack.name, len(alive)) as update:
      for real, bucket in jobs:
        moved = np.asarray(_attack(logits_fn, attack, params, key, *bucket))
        found[done : done + real.sum()] = moved[real]
        done += int(real.sum())
        update(int(real.sum()))
    right, found_margin = judge(found, alive)
    far, outside = _measure(attack.threat, found, images[alive], alive)
    broken = ~right & ~outside
    invalid[alive] = outside
    margin[alive] = np.where(outside, margin[alive], found_margin)
    hit = alive[broken]
    robust[hit] = False
    adv[hit] = found[broken]
    distance[hit] = far[broken]
    broken_by[hit] = attack.name
    forward, backward = attack.passes
    passes["forward"] += len(alive) * (forward + 1)
    passes["backward"] += len(alive) * backward
  return Result(
    clean=clean,
    robust=robust,
    broken_by=broken_by.astype(str),
    distance=distance,
    margin=margin,
    adv=adv,
    invalid=invalid,
    passes=passes,
    seconds=time.perf_counter() - started,
  )


@functools.lru_cache(maxsize=64)
def _with_params(logits_fn):
  """The function with params that it ignores; the same one for the same."""
  return lambda _, images: logits_fn(images)


@functools.partial(jax.jit, static_argnums=0)
def _attack(logits_fn, attack, params, key, images, labels, indices, eps):
  threat = dataclasses.replace(attack.threat, eps=eps)
  return dataclasses.replace(attack, threat=threat)(
    functools.partial(logits_fn, params),
    images,
    labels,
    keys.per_image(key, indices),
  )


@functools.partial(jax.jit, static_argnums=0)  # its shapes are remembered
def _logits(logits_fn, params, images):
  return logits_fn(params, images)


@functools.partial(jax.jit, static_argnums=0)
def _judge(logits_fn, params, images, labels):
  """Whether each image is classified as labelled, and by which margin."""
  with jax.default_matmul_precision("highest"):
    logits = logits_fn(params, images).astype(jnp.float32)
  return losses.correct(logits, labels), -losses.margin(logits, labels)


def _buckets(mesh, batch_size, *arrays) -> Iterator[tuple[np.ndarray, Any]]:
  """The arrays in pieces of two sizes, a batch and a quarter, on the devices.

  The last piece is padded with copies of its last row. Sizes are multiples of
  eight images a device: on smaller batches XLA takes kernels that round
  otherwise.

  Yields:
    Which rows are real, and the pieces.
  """
  unit = SMALLEST * mesh.size
  large = unit * -(-batch_size // unit)
  small = unit * -(-large // (4 * unit))
  start, n = 0, len(arrays[0])
  while start < n:
    size = large if n - start >= large else small
    rows = np.minimum(start + np.arange(size), n - 1)
    yield (
      np.arange(start, start + size) < n,
      sharding.put(tuple(a[rows] for a in arrays), mesh),
    )
    start += size


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


def _check_inputs(logits_fn, params, images, labels, indices, attack):
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
  out = jax.eval_shape(functools.partial(_logits, logits_fn), params, piece)
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
