"""The threat model: which images count as the same image to a person.

It is the only owner of the ball around the clean image and of the box of valid
pixels. Attacks ask it where they may go; evaluation measures with it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import projections, trees
from roli_jax.types import Array, Float, Images, Key, Keys, PerImage

NORMS = ("linf", "l2", "l1")

# Of an image's values, the share that one L1 step moves: the steepest step
# moves a single value, which needs as many gradients as there are values.
L1_SHARE = 0.05


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ThreatModel:
  """All images within `eps` of the clean one in a norm, and within the box.

  A pytree: the norm is structure; eps, low and high are data, so that another
  radius compiles nothing.

  Attributes:
    norm: `linf`, `l2` or `l1`, over all values of an image.
    eps: the radius in units of an image in [0, 1]: 8/255, never 8. A number,
      or one for each image, shape [b].
    low: the smallest value that a pixel may have.
    high: the largest.
  """

  norm: str = dataclasses.field(metadata=trees.STATIC)
  eps: PerImage
  low: float | Float[Array, ""] = 0.0
  high: float | Float[Array, ""] = 1.0

  def __post_init__(self) -> None:
    if self.norm not in NORMS:
      raise ValueError(f"unknown norm {self.norm!r}; there are {NORMS}")
    numbers = (int, float, np.ndarray, np.generic)
    if isinstance(self.eps, numbers):  # traced values can't be looked at
      eps = np.asarray(self.eps, np.float64)
      if not np.all(np.isfinite(eps) & (eps >= 0)):
        raise ValueError(f"eps must be finite and >= 0, got {self.eps}")
      box = isinstance(self.low, numbers) and isinstance(self.high, numbers)
      if self.norm == "linf" and box and np.any(eps > self.high - self.low):
        raise ValueError(
          "eps is in units of an image in [0, 1] and at most"
          f" {self.high - self.low} in linf, got {self.eps}"
          + (f"; did you mean {self.eps}/255?" if np.all(eps <= 255) else "")
        )

  def project(self, images: Images, origin: Images) -> Images:
    """Returns images in the ball and the box.

    Linf and L1: the nearest one. L2: the offset is scaled into the ball, then
    clipped to the box, which never leaves the ball since `origin` is in the
    box (as in AutoAttack); not always the nearest.

    Args:
      images: any finite values, [b, h, w, c].
      origin: the clean images, within the box, [b, h, w, c].
    """
    eps = per_image(self.eps, images)
    if self.norm == "linf":
      low = jnp.maximum(origin - eps, self.low)
      return jnp.clip(images, low, jnp.minimum(origin + eps, self.high))
    offset = images - origin
    if self.norm == "l2":
      length = _norm2(offset)
      inside = offset / (length + TINY) * jnp.minimum(eps, length)
      return jnp.clip(origin + inside, self.low, self.high)
    room = jnp.where(offset > 0, self.high - origin, origin - self.low)
    b = len(images)
    nearest = projections.onto_l1_ball(
      offset.reshape(b, -1),
      room.reshape(b, -1),
      jnp.broadcast_to(eps.reshape(-1, 1), (b, 1)),
    )
    return origin + nearest.reshape(images.shape)

  def steepest(self, grads: Images, images: Images) -> Images:
    """Returns the steepest direction of length 1, 0 where grads are 0.

    Linf: the sign. L2: the normalised gradient. L1: the signs of the 5% of
    largest entries among those that can still move, in equal shares (after
    Tramer and Boneh 2019, SLIDE).
    """
    if self.norm == "linf":
      return jnp.sign(grads)
    if self.norm == "l2":
      grads = near_one(grads)
      return grads / (_norm2(grads) + TINY)
    stuck = (images <= self.low) & (grads < 0)
    stuck |= (images >= self.high) & (grads > 0)
    flat = jnp.where(stuck, 0, grads).reshape(grads.shape[0], -1)
    num_kept = max(1, round(L1_SHARE * flat.shape[1]))
    least = jax.lax.top_k(jnp.abs(flat), num_kept)[0][:, -1:]
    kept = jnp.where(jnp.abs(flat) >= least, jnp.sign(flat), 0)
    count = jnp.maximum(jnp.abs(kept).sum(1, keepdims=True), 1)
    return (kept / count).reshape(grads.shape)

  def sample(self, keys: Keys, origin: Images) -> Images:
    """Draws uniformly from each image's ball, and projects into the box."""
    shape = origin.shape[1:]
    offset = jax.vmap(lambda key: _unit_ball(key, self.norm, shape))(keys)
    return self.project(
      origin + per_image(self.eps, origin) * offset.astype(origin.dtype),
      origin,
    )

  def distance(
    self, images: Images, origin: Images
  ) -> Float[Array | np.ndarray, " b"]:
    """Returns the norm of each image's offset, [b]; NumPy in, NumPy out."""
    offset: Any = (images - origin).reshape(len(images), -1)
    if self.norm == "linf":
      return abs(offset).max(axis=1)
    if self.norm == "l2":
      return (offset**2).sum(axis=1) ** 0.5
    return abs(offset).sum(axis=1)

  def measure(
    self, images: np.ndarray, origin: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Measures each image in float64 against the ball and the box.

    Tolerates a millionth of eps, and one rounding of a float32 pixel, summed
    over the image in the norm: an image that is clipped to the ball in float32
    may lie that much outside.

    Args:
      images: [b, h, w, c].
      origin: the clean images, [b, h, w, c].

    Returns:
      Distances, float64 [b]; whether each is within the ball, bool [b]; whether
      each is within the box, bool [b].
    """
    adv, origin = images.astype(np.float64), origin.astype(np.float64)
    far = np.asarray(self.distance(adv, origin), np.float64)
    size = int(np.prod(origin.shape[1:]))
    ulp = {"linf": 1.0, "l2": size**0.5, "l1": size}[self.norm] * 2.0**-24
    in_ball = far <= np.asarray(self.eps, np.float64) * (1 + 1e-6) + ulp
    # A float32 pixel is clipped to what float32 has for the bounds.
    low, high = np.float32(self.low), np.float32(self.high)
    valid = np.asarray((adv >= low) & (adv <= high))
    in_box = np.all(valid.reshape(len(adv), -1), axis=1)
    return far, in_ball, in_box


TINY = 1e-12  # guards divisions by a norm


def near_one(grads: Images, *others: Float[Array, " b"]) -> Any:
  """Scales each image's gradients so that the largest is in [0.5, 1).

  Squares of gradients of 1e-25 or 1e25 are 0 or inf in float32. The factors are
  powers of two, which round nothing.

  Args:
    grads: finite gradients.
    *others: [b] each; scaled by the same factors and returned after `grads`.
  """
  largest = jnp.abs(grads).max(_axes(grads), keepdims=True)
  _, exponent = jnp.frexp(largest)
  scaled = jnp.ldexp(grads, -exponent)
  if not others:
    return scaled
  return scaled, *(jnp.ldexp(x, -exponent.reshape(-1)) for x in others)


def per_image(value: PerImage, images: Images) -> Float[Array, "..."]:
  """Returns a scalar as it is, and values [b] as [b, 1, 1, 1]."""
  value = jnp.asarray(value, images.dtype)
  return value.reshape(-1, *(1,) * (images.ndim - 1)) if value.ndim else value


def _axes(images: Images) -> tuple[int, ...]:
  """All axes but the batch's."""
  return tuple(range(1, images.ndim))


def _norm2(images: Images) -> Float[Array, "..."]:
  """The L2 norm of each image, [b, 1, ...]."""
  return jnp.sqrt(jnp.square(images).sum(_axes(images), keepdims=True))


def _unit_ball(
  key: Key[Array, ""], norm: str, shape: tuple[int, ...]
) -> Float[Array, "*image"]:
  """Draws uniformly from the unit ball of a norm."""
  if norm == "linf":
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
  towards, radius = jax.random.split(key)
  size = int(np.prod(shape))
  if norm == "l2":
    offset = jax.random.normal(towards, shape)
    length = jax.random.uniform(radius) ** (1 / size)
    return offset * (length / (jnp.sqrt(jnp.square(offset).sum()) + TINY))
  # The first d of d + 1 exponentials over their sum, with random signs.
  parts = jax.random.exponential(towards, (size + 1,))
  signs = jax.random.rademacher(radius, shape, parts.dtype)
  return signs * (parts[:-1] / parts.sum()).reshape(shape)
