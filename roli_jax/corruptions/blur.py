"""Blur: Gaussian, defocus, glass, motion and zoom. Tables: see base.Table.

All take a generator, an image (uint8 [h, w, 1] or [h, w, 3]) and a severity
(1 to 5), and return an image of the same shape. Lengths are in pixels.
"""

import math

import numpy as np

from roli_jax.corruptions import base
from roli_jax.corruptions.base import Bytes, Rng
from roli_jax.types import Float

GAUSSIAN_BLUR = {  # standard deviation
  32: (0.4, 0.6, 0.7, 0.8, 1),
  64: (0.5, 0.75, 1, 1.25, 1.5),
  224: (1, 2, 3, 4, 6),
}
DEFOCUS_BLUR = {  # radius of the disk, deviation that smooths the disk's edge
  32: ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
  64: ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
  224: ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
}
GLASS_BLUR = {  # standard deviation, reach of a shuffle, shuffles
  32: ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
  64: ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
  224: ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
}
MOTION_BLUR = {  # radius, standard deviation
  32: ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
  64: ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
  224: ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
}
ZOOM_BLUR = {  # where factors end, by how much each is above the last
  32: ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
  64: ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
  224: ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
}


def gaussian_blur(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Averages with normal weights; deterministic."""
  sigma = base.level(GAUSSIAN_BLUR, image, severity)
  return base.pixels(base.soften(base.unit(image), sigma))


def defocus_blur(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Averages over a disk; deterministic.

  As in the authors' code, large disks weigh a little more than 1 in all: 1%
  brighter at severities 4 and 5 of ImageNet-C.
  """
  from scipy import ndimage

  kernel = _disk(*base.level(DEFOCUS_BLUR, image, severity))
  x = ndimage.correlate(base.unit(image), kernel[..., None], mode="mirror")
  return base.pixels(x)


def _disk(radius: float | int, sigma: float | int) -> np.ndarray:
  """Makes a disk whose edge a Gaussian of 3 (large disks: 5) pixels smooths."""
  from scipy import ndimage

  reach, half = (8, 1) if radius <= 8 else (math.ceil(radius), 2)
  line = np.arange(-reach, reach + 1)
  disk = 1.0 * (line[:, None] ** 2 + line**2 <= radius**2)
  disk /= disk.sum()
  weights = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * sigma**2))
  weights /= weights.sum()
  for axis in (0, 1):
    disk = ndimage.correlate1d(disk, weights, axis, mode="mirror")
  return disk


def glass_blur(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Blurs, shuffles pixels within a small reach, and blurs again.

  Rows and columns are gone through from the last to the first. The authors'
  code means to exchange each pixel with a neighbour but, as it exchanges
  views of one array, gives the neighbour's value to both. We do as the
  published images were made.
  """
  sigma, reach, shuffles = base.level(GLASS_BLUR, image, severity)
  height, width, channels = image.shape
  x = base.pixels(base.soften(base.unit(image), sigma))
  rows = np.arange(height - reach, reach, -1)
  columns = np.arange(width - reach, reach, -1)
  here = rows[:, None] * width + columns
  # Where each pixel comes from; loops are quicker over a list than an array.
  source = list(range(height * width))
  for _ in range(shuffles):
    down, right = rng.integers(-reach, reach, (2, *here.shape))
    there = here + down * width + right
    for p, q in zip(here.ravel().tolist(), there.ravel().tolist(), strict=True):
      source[p] = source[q]
  x = x.reshape(-1, channels)[source].reshape(image.shape)
  return base.pixels(base.soften(base.unit(x), sigma))


def motion_blur(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Smears the image along a line at -45 to 45 degrees.

  The authors call ImageMagick; `trail` is our own line kernel and agrees with
  its -motion-blur (6.9.11) to one level.
  """
  radius, sigma = base.level(MOTION_BLUR, image, severity)
  angle = rng.uniform(-45, 45)
  return base.pixels(trail(base.unit(image), radius, sigma, angle))


def trail(
  x: Float[np.ndarray, "h w *c"],
  radius: int,
  sigma: float | int,
  angle: float | int,
) -> Float[np.ndarray, "h w *c"]:
  """Averages each pixel over a line that starts at it.

  The line has 2 radius + 1 pixels and the weights of half a normal density;
  beyond the border edges go on.

  Args:
    x: float, [h, w] or [h, w, c].
    radius: half of the line's length, in pixels.
    sigma: the standard deviation of the weights, in pixels.
    angle: the line's direction in degrees, from the right to the bottom.
  """
  steps, turn = np.arange(2 * radius + 1), math.radians(angle)
  weights = np.exp(-(steps**2) / (2 * sigma**2))
  reach = 2 * radius
  down = np.rint(steps * math.sin(turn)).astype(int) + reach
  right = np.rint(steps * math.cos(turn)).astype(int) + reach
  (height, width), rest = x.shape[:2], x.ndim - 2
  frame = ((reach, reach), (reach, reach), *((0, 0),) * rest)
  padded = np.pad(x, frame, mode="edge")
  total = np.zeros_like(x)
  for weight, i, j in zip(weights, down, right, strict=True):
    total += weight * padded[i : i + height, j : j + width]
  return total / weights.sum()


def zoom_blur(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Averages the image and enlargements of it; deterministic.

  Enlargements are of whole pixels: below 18 of them severity 1 makes none.
  """
  stop, step = base.level(ZOOM_BLUR, image, severity)
  x = base.unit(image)
  # The number of factors is that of the authors, whatever arange rounds.
  layers = [x, *(enlarge(x, factor) for factor in np.arange(1, stop, step))]
  return base.pixels(np.mean(layers, axis=0))


def enlarge(
  x: Float[np.ndarray, "h w *c"], factor: float | int
) -> Float[np.ndarray, "h w *c"]:
  """Enlarges the middle to the size of the whole."""
  from scipy import ndimage

  height, width = x.shape[:2]
  cut = _middle(x, math.ceil(height / factor), math.ceil(width / factor))
  factors = (factor, factor, 1)[: x.ndim]
  large = ndimage.zoom(cut, factors, order=1, mode="nearest")
  return _middle(large, height, width)


def _middle(x: np.ndarray, height: int, width: int) -> np.ndarray:
  top, left = (x.shape[0] - height) // 2, (x.shape[1] - width) // 2
  return x[top : top + height, left : left + width]
