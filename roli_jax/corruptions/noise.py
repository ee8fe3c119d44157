"""Noise: Gaussian, shot, impulse and speckle. Tables: see base.Table.

All take a generator, an image (uint8 [h, w, 1] or [h, w, 3]) and a severity
(1 to 5), and return an image of the same shape. Channels have noise of their
own.
"""

import numpy as np

from roli_jax.corruptions import base
from roli_jax.corruptions.base import Bytes, Rng

GAUSSIAN_NOISE = {  # standard deviation, of the range
  32: (0.04, 0.06, 0.08, 0.09, 0.10),
  64: (0.04, 0.08, 0.12, 0.15, 0.18),
  224: (0.08, 0.12, 0.18, 0.26, 0.38),
}
SHOT_NOISE = {  # photons of a white pixel
  32: (500, 250, 100, 75, 50),
  64: (250, 100, 50, 30, 15),
  224: (60, 25, 12, 5, 3),
}
IMPULSE_NOISE = {  # share of values that are lost
  32: (0.01, 0.02, 0.03, 0.05, 0.07),
  64: (0.01, 0.02, 0.05, 0.08, 0.14),
  224: (0.03, 0.06, 0.09, 0.17, 0.27),
}
SPECKLE_NOISE = {  # standard deviation, of the pixel's value
  32: (0.06, 0.10, 0.12, 0.16, 0.20),
  64: (0.15, 0.20, 0.25, 0.30, 0.35),
  224: (0.15, 0.20, 0.35, 0.45, 0.60),
}


def gaussian_noise(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Adds normal noise, the same everywhere."""
  scale = base.level(GAUSSIAN_NOISE, image, severity)
  return base.pixels(base.unit(image) + rng.normal(0, scale, image.shape))


def shot_noise(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Counts photons: Poisson noise of the pixel's mean."""
  photons = base.level(SHOT_NOISE, image, severity)
  return base.pixels(rng.poisson(base.unit(image) * photons) / photons)


def impulse_noise(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Adds salt and pepper in equal shares."""
  lost = rng.random(image.shape) < base.level(IMPULSE_NOISE, image, severity)
  salt = rng.random(image.shape) < 0.5
  return np.where(lost, np.where(salt, np.uint8(255), np.uint8(0)), image)


def speckle_noise(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Adds normal noise in proportion to the pixel."""
  scale = base.level(SPECKLE_NOISE, image, severity)
  return base.pixels(base.unit(image) * (1 + rng.normal(0, scale, image.shape)))
