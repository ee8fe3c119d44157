"""Common corruptions: `(rng, image, severity) -> image`, in numpy and PIL.

The 15 standard types of ImageNet-C and the 4 extra ones (Hendrycks and
Dietterich 2019, arXiv 1903.12261), with the published strengths, and 5 of our
own for glyphs. Given the authors' random numbers, these functions make what
the authors' code makes, to one level of 255, at 32, 64 and 224 pixels; what
does not stands in `NON_STANDARD`. But the random numbers are ours, and the
files of ImageNet-C were saved as JPEG of quality 85 at the end: numbers from
the published files are to be had with those files only.
"""

import zlib
from collections.abc import Callable

import numpy as np

from roli_jax import specs
from roli_jax.corruptions import base, blur, digital, glyphs, noise, weather
from roli_jax.corruptions.base import SEVERITIES

Corruption = Callable[[np.random.Generator, np.ndarray, int], np.ndarray]

# They raise a ValueError for a wrong severity; `apply` checks the image.
CORRUPTIONS: dict[str, Corruption] = {
  "gaussian_noise": noise.gaussian_noise,
  "shot_noise": noise.shot_noise,
  "impulse_noise": noise.impulse_noise,
  "defocus_blur": blur.defocus_blur,
  "glass_blur": blur.glass_blur,
  "motion_blur": blur.motion_blur,
  "zoom_blur": blur.zoom_blur,
  "snow": weather.snow,
  "frost": weather.frost,
  "fog": weather.fog,
  "brightness": weather.brightness,
  "contrast": digital.contrast,
  "elastic_transform": digital.elastic_transform,
  "pixelate": digital.pixelate,
  "jpeg_compression": digital.jpeg_compression,
  "speckle_noise": noise.speckle_noise,
  "gaussian_blur": blur.gaussian_blur,
  "spatter": weather.spatter,
  "saturate": digital.saturate,
  "glyph_noise": glyphs.glyph_noise,
  "glyph_blur": glyphs.glyph_blur,
  "glyph_contrast": glyphs.glyph_contrast,
  "glyph_brightness": glyphs.glyph_brightness,
  "glyph_pixelate": glyphs.glyph_pixelate,
}

STANDARD = tuple(CORRUPTIONS)[:15]
EXTRA = tuple(CORRUPTIONS)[15:19]
GLYPHS = tuple(CORRUPTIONS)[19:]

# What is not the published corruption, and why.
NON_STANDARD = {
  "frost": "crystals are drawn, not cut from photographs",
  "spatter": "water (severities 1 to 3) has rims of ours, not OpenCV's Canny",
}

# The types of the Guide benchmark, in its order.
GUIDE = (
  "shot_noise", "impulse_noise", "defocus_blur", "motion_blur", "zoom_blur",
  "snow", "brightness", "contrast", "elastic_transform", "pixelate",
  "jpeg_compression",
)  # fmt: skip


def apply(
  name: str,
  image: np.ndarray,
  severity: int,
  index: int | np.integer,
  seed: int = 0,
) -> np.ndarray:
  """Corrupts an image; returns uint8 of the same shape.

  What is drawn depends on the seed, the type, the severity and the image's
  index, and on nothing else: not on order, batches or processes.

  Args:
    name: one of `CORRUPTIONS`.
    image: uint8, [h, w, 3], or [h, w, 1] if grey; 8 pixels or more each way.
      Strengths are those published for images of about its size.
    severity: 1 to 5.
    index: the image's number in its data set, 0 or more.
    seed: seeds all corruptions, 0 or more.

  Raises:
    ValueError: an unknown name, another image or severity, a negative index
      or seed, or a grey image for `saturate`.
  """
  corrupt = specs.lookup(CORRUPTIONS, name, "corruption")
  if image.dtype != np.uint8:
    raise ValueError(
      f"corruptions take bytes of 0 to 255 (uint8), got {image.dtype}"
    )
  if image.ndim != 3 or image.shape[-1] not in (1, 3) or min(image.shape) < 1:
    raise ValueError(
      f"corruptions take an image [h, w, 1] or [h, w, 3], got {image.shape}"
    )
  if min(image.shape[:2]) < 8:
    raise ValueError(
      f"corruptions take images of 8 x 8 pixels or more, got {image.shape}"
    )
  base.check_severity(severity)
  if index < 0 or seed < 0:
    raise ValueError(
      f"index and seed must not be negative, got {index} and {seed}"
    )
  entropy = [seed, zlib.crc32(name.encode()), severity, int(index)]
  return corrupt(np.random.default_rng(entropy), image, severity)


def guide(index: int | np.integer, count: int | None = None) -> str:
  """Returns the type that the Guide benchmark gives an image, one of `GUIDE`.

  The benchmark (Heuillet et al. 2025, arXiv 2508.14079; severity 3) goes
  through a test set in blocks of one type: those of `count // 11` images, and
  what is left over begins again with the first (MaxHeuillet/robust_training,
  corruptions/common.py). It corrupts images before it resizes them, at the
  strengths for 224 pixels whatever their size, and its elastic_transform has
  no affine map.

  Args:
    index: the image's number in the test set, from 0.
    count: the number of images in the test set, for the benchmark's rule.
      None: the types in turn, `index % 11`, which is our own: what an image
      gets doesn't depend on how many there are, and classes in order all get
      all types.

  Raises:
    ValueError: an index outside the test set.
  """
  if index < 0 or (count is not None and index >= count):
    below = "" if count is None else f" and below {count}"
    raise ValueError(f"index must be 0 or more{below}, got {index}")
  block = 1 if count is None else max(1, count // len(GUIDE))
  return GUIDE[int(index) // block % len(GUIDE)]


__all__ = [
  "CORRUPTIONS",
  "EXTRA",
  "GLYPHS",
  "GUIDE",
  "NON_STANDARD",
  "SEVERITIES",
  "STANDARD",
  "Corruption",
  "apply",
  "guide",
]
