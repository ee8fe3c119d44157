"""Keeps what the model says of shifted images: our own design.

Inspired by Yuan et al. 2025 (arXiv:2509.05328), of which we know the abstract
alone: that the distance from the pretrained model's function is penalised on
simulated shifted images, and that predictions on perturbed images be stable.
Every choice here is ours: simulators, distances, where they are measured, which
model is the reference, weights and defaults. Nothing of it is tuned.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from roli_jax import keys, losses, specs
from roli_jax.objectives.base import Batch, Forward
from roli_jax.types import Array, Float, Images, Keys, Logits, Params, PyTree


def symmetric_kl(logits: Logits, target: Logits) -> Float[Array, "b"]:
  """The mean of KL both ways."""
  return (losses.kl(logits, target) + losses.kl(target, logits)) / 2


def centred_l2(logits: Logits, target: Logits) -> Float[Array, "b"]:
  """The squared distance of logits whose mean is subtracted."""
  apart = logits - target
  return jnp.sum((apart - apart.mean(-1, keepdims=True)) ** 2, -1)


# `(logits, target) -> [b]`.
DISTANCES: dict[str, Callable[..., Any]] = {
  "kl": losses.kl,
  "symmetric_kl": symmetric_kl,
  "l2": centred_l2,
}


def _adversarial(batch: Batch, image_keys: Keys, std: float | int) -> Images:
  """The images that the step trains on."""
  del image_keys, std
  return batch.adv


def _noise(batch: Batch, image_keys: Keys, std: float | int) -> Images:
  """Clean images under Gaussian noise, within [0, 1] again."""
  shape = batch.clean.shape[1:]
  noise = jax.vmap(lambda key: jax.random.normal(key, shape))(image_keys)
  return jnp.clip(batch.clean + std * noise, 0, 1)


def _mixup(batch: Batch, image_keys: Keys, std: float | int) -> Images:
  """Clean images, each mixed with the reversed batch's in a uniform ratio."""
  del std
  ratios = jax.vmap(jax.random.uniform)(image_keys)
  ratios = ratios.reshape(-1, *[1] * (batch.clean.ndim - 1))
  return ratios * batch.clean + (1 - ratios) * batch.clean[::-1]


# `(batch, a key for each image, std) -> images`.
SIMULATORS: dict[str, Callable[..., Any]] = {
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
  adversarial x~ the first term keeps what the probe says under attack.

  All passes are in evaluation mode: what is compared is what is tested, and no
  running statistics move.

  Attributes:
    simulator: what x~ is: `adversarial`, the images that are trained on;
      `noise`, Gaussian of `std`; `mixup`, convex mixtures.
    distance: D: `kl`, KL(q0 || q); `symmetric_kl`, the mean of both ways; `l2`,
      the squared distance of centred logits, the same for all T.
    lam_fun: >= 0. 0: no reference is kept.
    lam_cons: >= 0.
    temperature: T > 0.
    std: the standard deviation of noise, >= 0; a white pixel is 1.
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
  ) -> tuple[Float[Array, "b"], PyTree]:
    see = forward.model.logits
    shifted = self.shifted(batch)
    logits = see(params, stats, shifted)
    values = jnp.zeros(len(shifted), logits.dtype)
    if self.lam_fun:
      began, began_stats = memory["reference"]
      before = see(began, began_stats, shifted)
      values += self.lam_fun * self.apart(logits, before)
    if self.lam_cons:
      said = jax.lax.stop_gradient(see(params, stats, batch.clean))
      values += self.lam_cons * losses.kl(logits, said)
    return values, memory

  def shifted(self, batch: Batch) -> Images:
    """x~: an image's draw is its own."""
    key = keys.stream(batch.key, "function_space")
    image_keys = keys.per_image(key, batch.indices)
    return SIMULATORS[self.simulator](batch, image_keys, self.std)

  def apart(self, logits: Logits, target: Logits) -> Float[Array, "b"]:
    """T^2 D, whose gradient keeps its size as T grows."""
    t = self.temperature
    return t**2 * DISTANCES[self.distance](logits / t, target / t)
