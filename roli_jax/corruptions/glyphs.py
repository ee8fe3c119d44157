"""Corruptions of glyphs: grey images of 8 x 8 pixels.

Published strengths are for photographs with 16 times the pixels and more; here
a trail of 13 pixels leaves the image, and a box is a stroke's width. These
strengths are our own: from what a reader hardly notices to what a reader hardly
reads. The functions take any size and any channels, and values of 0 to 255
(digits of 0 to 16 are to be scaled).

All take a generator, an image (uint8 [h, w, 1] or [h, w, 3]) and a severity
(1 to 5), and return an image of the same shape.
"""

from roli_jax.corruptions import base, digital
from roli_jax.corruptions.base import Bytes, Rng

NOISE = (0.04, 0.08, 0.12, 0.18, 0.25)  # standard deviation, of the range
BLUR = (0.4, 0.55, 0.7, 0.85, 1)  # standard deviation, in pixels
CONTRAST = (0.7, 0.5, 0.35, 0.2, 0.1)  # factor on the distance to the mean
BRIGHTNESS = (0.1, 0.2, 0.3, 0.45, 0.6)  # added, of the range
PIXELATE = (0.3, 0.5, 0.7, 0.85, 1)  # share of the blocks


def glyph_noise(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Adds normal noise."""
  scale = base.at(NOISE, severity)
  return base.pixels(base.unit(image) + rng.normal(0, scale, image.shape))


def glyph_blur(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Averages with normal weights; deterministic."""
  return base.pixels(base.soften(base.unit(image), base.at(BLUR, severity)))


def glyph_contrast(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Pulls pixels towards their mean; deterministic."""
  x = base.unit(image)
  return base.pixels(x.mean() + base.at(CONTRAST, severity) * (x - x.mean()))


def glyph_brightness(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Adds the same to all pixels; deterministic."""
  return base.pixels(base.unit(image) + base.at(BRIGHTNESS, severity))


def glyph_pixelate(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Mixes in the means of blocks of 2 x 2 pixels; deterministic."""
  share, (height, width) = base.at(PIXELATE, severity), image.shape[:2]
  blocks = base.unit(digital.reduce(image, height // 2, width // 2))
  return base.pixels((1 - share) * base.unit(image) + share * blocks)
