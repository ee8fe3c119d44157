"""Corruptions of glyphs: grey images of 8 x 8 pixels.

Published strengths are of photographs with 16 times the pixels and more; here
a trail of 13 pixels leaves the image, and a box is a stroke's width. These are
of our own: from what a reader hardly notices to what a reader hardly reads.
The functions take any size and any channels, and values of 0 to 255 (digits of
0 to 16 are to be scaled).

All take a generator, an image (uint8 [h, w, 1] or [h, w, 3]) and a severity
(1 to 5), and return an image of the same shape.
"""

import numpy as np

from roli_jax.corruptions import base, digital

NOISE = (0.04, 0.08, 0.12, 0.18, 0.25)  # standard deviation, of the range
BLUR = (0.4, 0.55, 0.7, 0.85, 1)  # standard deviation, in pixels
CONTRAST = (0.7, 0.5, 0.35, 0.2, 0.1)  # of the distance to the mean
BRIGHTNESS = (0.1, 0.2, 0.3, 0.45, 0.6)  # added, of the range
PIXELATE = (0.3, 0.5, 0.7, 0.85, 1)  # share of the blocks


def glyph_noise(rng: base.Rng, image: np.ndarray, severity: int) -> np.ndarray:
  """Adds normal noise."""
  scale = base.at(NOISE, severity)
  return base.pixels(base.unit(image) + rng.normal(0, scale, image.shape))


def glyph_blur(rng: base.Rng, image: np.ndarray, severity: int) -> np.ndarray:
  """Averages with normal weights; no chance in it."""
  return base.pixels(base.soften(base.unit(image), base.at(BLUR, severity)))


def glyph_contrast(
  rng: base.Rng, image: np.ndarray, severity: int
) -> np.ndarray:
  """Draws pixels towards their mean; no chance in it."""
  x = base.unit(image)
  return base.pixels(x.mean() + base.at(CONTRAST, severity) * (x - x.mean()))


def glyph_brightness(
  rng: base.Rng, image: np.ndarray, severity: int
) -> np.ndarray:
  """Adds the same to all pixels; no chance in it."""
  return base.pixels(base.unit(image) + base.at(BRIGHTNESS, severity))


def glyph_pixelate(
  rng: base.Rng, image: np.ndarray, severity: int
) -> np.ndarray:
  """Mixes in the means of blocks of 2 x 2 pixels; no chance in it."""
  share, (height, width) = base.at(PIXELATE, severity), image.shape[:2]
  blocks = base.unit(digital.reduce(image, height // 2, width // 2))
  return base.pixels((1 - share) * base.unit(image) + share * blocks)
