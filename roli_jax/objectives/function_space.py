"""Keeps the model's predictions on shifted images: our own design.

Inspired by Yuan et al. 2025 (arXiv:2509.05328), of which we know the abstract
alone: it penalises the distance from the pretrained model's function on
simulated shifted images, and asks for stable predictions on perturbed images.
Every choice here is ours: simulators, distances, where they are measured, which
model is the reference, weights and defaults. None of them is tuned.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from roli_jax import keys, losses, specs
from roli_jax.objectives.base import Batch, Forward
from roli_jax.types import Array, Float, Images, Keys, Logits, Params, PyTree


def symmetric_kl(logits: Logits, target: Logits) -> Float[Array, " b"]:
  """Returns the mean of KL both ways."""
  return (losses.kl(logits, target) + losses.kl(target, logits)) / 2


def centred_l2(logits: Logits, target: Logits) -> Float[Array, " b"]:
  """Returns the squared distance of logits after subtracting their means."""
  apart = logits - target
  return jnp.sum((apart - apart.mean(-1, keepdims=True)) ** 2, -1)


DISTANCES: dict[str, Callable[[Logits, Logits], Float[Array, " b"]]] = {
  "kl": losses.kl,
  "symmetric_kl": symmetric_kl,
  "l2": centred_l2,
}


def _adversarial(batch: Batch, image_keys: Keys, std: float | int) -> Images:
  """Returns the images that the step trains on."""
  del image_keys, std
  return batch.adv


def _noise(batch: Batch, image_keys: Keys, std: float | int) -> Images:
  """Adds Gaussian noise to clean images and clips them to [0, 1]."""
  shape = batch.clean.shape[1:]
  noise = jax.vmap(lambda key: jax.random.normal(key, shape))(image_keys)
  return jnp.clip(batch.clean + std * noise, 0, 1)


def _mixup(batch: Batch, image_keys: Keys, std: float | int) -> Images:
  """Mixes clean images with those of the reversed batch in uniform ratios."""
  del std
  ratios = jax.vmap(jax.random.uniform)(image_keys)
  ratios = ratios.reshape(-1, *[1] * (batch.clean.ndim - 1))
  return ratios * batch.clean + (1 - ratios) * batch.clean[::-1]


# `(batch, a key for each image, std) -> images`.
SIMULATORS: dict[str, Callable[[Batch, Keys, float | int], Images]] = {
  "adversarial": _adversarial,
  "noise": _noise,
  "mixup": _mixup,
}


@dataclasses.dataclass(frozen=True)
class FunctionSpace:
  """lam_fun T^2 D(q0(x~), q(x~)) + lam_cons KL(p(x) || p(x~)); our own design.

  p(x) = softmax f(x) without a gradient, p(x~) with one. q and q0 are softmax
  f(x~) / T of the model and of the model that the stage began with. For RoLI
  that is the robust backbone under its adversarial linear probe; with
  adversarial x~ the first term keeps the probe's predictions under attack.

  All passes are in evaluation mode: the compared function is the tested one,
  and no running statistics move.

  Attributes:
    simulator: makes x~: `adversarial`, the images that are trained on; `noise`,
      clean ones plus Gaussian noise; `mixup`, convex mixtures of clean ones.
    distance: D: `kl`, KL(q0 || q); `symmetric_kl`, the mean of both ways; `l2`,
      the squared distance of centred logits, the same for all T.
    lam_fun: the weight of the first term, >= 0; 0 keeps no reference model.
    lam_cons: the weight of the second term, >= 0.
    temperature: T > 0.
    std: the standard deviation of noise in units of an image in [0, 1], >= 0.
  """

  simulator: str = "adversarial"
  distance: str = "kl"
  lam_fun: float | int = 1.0
  lam_cons: float | int = 1.0
  temperature: float | int = 1.0
  std: float | int = 0.1

  def __post_init__(self):
    specs.lookup(SIMULATORS, self.simulator, "simulator")
    specs.lookup(DISTANCES, self.distance, "distance")
    for name in ("lam_fun", "lam_cons", "std"):
      if not getattr(self, name) >= 0:
        raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
    if not self.temperature > 0:
      raise ValueError(f"temperature must be > 0, got {self.temperature}")

  @property
  def needs_attack(self) -> bool:
    return self.simulator == "adversarial"

  @property
  def needs_clean(self) -> bool:
    return self.lam_cons > 0

  @property
  def needs_start(self) -> bool:
    return self.lam_fun > 0

  def init_memory(self, params: Params, stats: PyTree) -> PyTree:
    return {"reference": (params, stats)} if self.lam_fun else {}

  def __call__(
    self,
    forward: Forward,
    params: Params,
    stats: PyTree,
    memory: PyTree,
    batch: Batch,
  ) -> tuple[Float[Array, " b"], PyTree]:
    predict = forward.model.logits
    shifted = self.shifted(batch)
    logits = predict(params, stats, shifted)
    values = jnp.zeros(len(shifted), logits.dtype)
    if self.lam_fun:
      start_params, start_stats = memory["reference"]
      reference = predict(start_params, start_stats, shifted)
      values += self.lam_fun * self.apart(logits, reference)
    if self.lam_cons:
      clean = jax.lax.stop_gradient(predict(params, stats, batch.clean))
      values += self.lam_cons * losses.kl(logits, clean)
    return values, memory

  def shifted(self, batch: Batch) -> Images:
    """Returns x~; each image has a random key of its own."""
    key = keys.stream(batch.key, "function_space")
    image_keys = keys.per_image(key, batch.indices)
    return SIMULATORS[self.simulator](batch, image_keys, self.std)

  def apart(self, logits: Logits, target: Logits) -> Float[Array, " b"]:
    """Returns T^2 D, whose gradient keeps its size as T grows."""
    t = self.temperature
    return t**2 * DISTANCES[self.distance](logits / t, target / t)
