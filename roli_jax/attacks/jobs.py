"""The jobs of a search: their inputs, their progress, and where they start."""

from typing import Any

import jax
import jax.numpy as jnp

from roli_jax import trees
from roli_jax.threat import TINY, ThreatModel, per_image
from roli_jax.types import Array, Float, Images, Key, Keys, Labels, Logits


@trees.tree_class
class Job:
  """The inputs of b jobs, one row a job.

  The annotations of this class and of states are `Any`, and the shapes stand in
  the docstrings: a loop over parts of a pool adds a leading axis, and JAX puts
  placeholders in place of arrays where it matches a tree with shardings.

  Attributes:
    images: float [b, *image], the clean images within the box.
    labels: int [b], their classes.
    targets: int [b], the classes aimed at; unused by a search without targets.
    restart: int32 [b], the number of the restart, from 0.
    eps: float [b], the radius.
    keys: random keys [b].
    noise: float [b, *image], scaled to make the start; None draws it from the
      keys.
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
  """The progress of b jobs, one row a job.

  Attributes:
    i: int32 [b], steps taken.
    adv: float [b, *image], a misclassified image of the threat model where one
      was found, else the clean image.
    found: bool [b], whether a misclassified image was found.
    done: bool [b], whether the job has ended.
    merit: float [b], ranks the jobs of an image by what `pick` returns; higher
      is better.
  """

  i: Any
  adv: Any
  found: Any
  done: Any
  merit: Any


def fresh_state(job: Job) -> dict[str, jax.Array]:
  """Returns the fields of `State` for jobs that have not taken a step."""
  images = jnp.asarray(job.images)
  b = len(images)
  return {
    "i": jnp.zeros(b, jnp.int32),
    "adv": images,
    "found": jnp.zeros(b, bool),
    "done": jnp.zeros(b, bool),
    "merit": jnp.full(b, -jnp.inf, images.dtype),
  }


def make_job(
  threat: ThreatModel,
  images: Images,
  labels: Labels | Logits,
  keys: Keys,
  *,
  targets: Labels | None = None,
  restart: int | jax.Array = 0,
  noise: Images | None = None,
) -> Job:
  """Returns one job for each image.

  Args:
    threat: its radius, or radii, are those of the jobs.
    images: the clean ones, [b, *image].
    labels: their classes, [b], or what else the loss compares with.
    keys: one random key for each image, [b].
    targets: the classes aimed at, [b]; None: the labels, by a search that aims
      at none.
    restart: the number of the restart, the same for all.
    noise: what the start is made from, [b, *image]; None draws it.
  """
  b = len(images)
  return Job(
    images=images,
    labels=labels,
    targets=labels if targets is None else targets,
    restart=jnp.full(b, restart, jnp.int32),
    eps=jnp.broadcast_to(jnp.asarray(threat.eps, images.dtype), (b,)),
    keys=keys,
    noise=noise,
  )


def noisy_start(
  job: Job, threat: ThreatModel, radius: Float[Array, " b"]
) -> Images:
  """Returns the clean images plus noise of given length, clipped to the box.

  Args:
    job: its images, and its noise or keys.
    threat: the norm and the box.
    radius: the length of each image's noise in that norm.
  """
  x, offset = jnp.asarray(job.images), noise(job, threat.norm)
  length = threat.distance(offset, jnp.zeros_like(offset))
  # TINY: noise of zeros stays zeros.
  ratio = per_image(radius / (length + TINY), x)
  return jnp.clip(x + ratio * offset, threat.low, threat.high)


def noise(job: Job, norm: str) -> Images:
  """Returns the job's noise, or draws it: uniform for linf, else normal."""
  if job.noise is not None:
    return jnp.asarray(job.noise)
  shape, dtype = job.images.shape[1:], job.images.dtype

  def draw(key: Key[Array, ""]) -> Float[Array, "*image"]:
    if norm == "linf":
      return jax.random.uniform(key, shape, dtype, -1.0, 1.0)
    return jax.random.normal(key, shape, dtype)

  return jax.vmap(draw)(job.keys)
