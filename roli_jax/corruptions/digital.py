"""Digital: contrast, elastic, pixelate, JPEG and saturate; see base.Table.

All take a generator, an image (uint8 [h, w, 1] or [h, w, 3]) and a severity
(1 to 5), and return an image of the same shape.
"""

import io

import numpy as np

from roli_jax.corruptions import base
from roli_jax.corruptions.base import Bytes, Field, Rng
from roli_jax.data import decode
from roli_jax.files import extras

CONTRAST = {  # what is left of the distance to the mean
  32: (0.75, 0.5, 0.4, 0.3, 0.15),
  64: (0.4, 0.3, 0.2, 0.1, 0.05),
  224: (0.4, 0.3, 0.2, 0.1, 0.05),
}
# Height and deviation of the waves, reach of the affine map: in sides of the
# image. Those at 224 were published in pixels, as shares of 244.
_AT_224 = 244 / 224
ELASTIC_TRANSFORM = {
  32: (
    (0, 0, 0.08),
    (0.05, 0.2, 0.07),
    (0.08, 0.06, 0.06),
    (0.1, 0.04, 0.05),
    (0.1, 0.03, 0.03),
  ),
  64: (
    (0, 0, 0.08),
    (0.05, 0.3, 0.06),
    (0.1, 0.08, 0.06),
    (0.1, 0.03, 0.03),
    (0.16, 0.03, 0.02),
  ),
  224: (
    (2 * _AT_224, 0.7 * _AT_224, 0.1 * _AT_224),
    (2 * _AT_224, 0.08 * _AT_224, 0.2 * _AT_224),
    (0.05 * _AT_224, 0.01 * _AT_224, 0.02 * _AT_224),
    (0.07 * _AT_224, 0.01 * _AT_224, 0.02 * _AT_224),
    (0.12 * _AT_224, 0.01 * _AT_224, 0.02 * _AT_224),
  ),
}
PIXELATE = {  # sides of the small image over those of the large
  32: (0.95, 0.9, 0.85, 0.75, 0.65),
  64: (0.9, 0.8, 0.7, 0.6, 0.5),
  224: (0.6, 0.5, 0.4, 0.3, 0.25),
}
JPEG_COMPRESSION = {  # quality
  32: (80, 65, 58, 50, 40),
  64: (65, 58, 50, 40, 25),
  224: (25, 18, 15, 10, 7),
}
SATURATE = {  # factor of the saturation of HSV, what is added to it
  32: ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
  64: ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (30, 0.2)),
  224: ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
}


def contrast(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Pulls each channel towards its mean; deterministic."""
  x = base.unit(image)
  mean = x.mean((0, 1), keepdims=True)
  return base.pixels(mean + base.level(CONTRAST, image, severity) * (x - mean))


def elastic_transform(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Applies a random affine map, then random waves (Simard et al. 2003).

  Published for square images; ours are in sides of the shorter one. The
  affine map is that which takes three points around the middle to where
  chance moves them; the image goes on mirrored.
  """
  from scipy import ndimage

  height, width, channels = image.shape
  side = min(height, width)
  alpha, sigma, reach = (
    side * share for share in base.level(ELASTIC_TRANSFORM, image, severity)
  )
  arm = side // 3
  corners = np.array([[arm, arm], [arm, -arm], [-arm, -arm]])
  before = np.array([height // 2, width // 2]) + corners
  after = before + rng.uniform(-reach, reach, before.shape)
  # From points of the result to those of the image: (i, j, 1) @ back.
  back = np.linalg.solve(np.column_stack([after, np.ones(3)]), before)

  def wave() -> Field:
    noise = rng.uniform(-1, 1, (height, width))
    return alpha * ndimage.gaussian_filter(noise, sigma, truncate=3)

  places = np.indices((height, width)) + np.stack([wave(), wave()])
  x = base.unit(image)
  for c in range(channels):
    moved = ndimage.affine_transform(
      x[..., c], back[:2].T, back[2], order=1, mode="mirror"
    )
    x[..., c] = ndimage.map_coordinates(moved, places, order=1, mode="reflect")
  return base.pixels(x)


def pixelate(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Shrinks by means of boxes and enlarges by repetition; deterministic."""
  share = base.level(PIXELATE, image, severity)
  height, width = image.shape[:2]
  return reduce(image, int(height * share), int(width * share))


def reduce(image: Bytes, height: int, width: int) -> Bytes:
  """Leaves the detail of height x width pixels, at the image's own size."""
  extras.need("PIL")
  from PIL import Image

  picture, box = decode.from_array(image), Image.Resampling.BOX
  small = picture.resize((width, height), box)
  return np.array(small.resize(picture.size, box)).reshape(image.shape)


def jpeg_compression(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Writes and reads JPEG by PIL, colours at half size; deterministic."""
  extras.need("PIL")
  from PIL import Image

  file = io.BytesIO()
  quality = base.level(JPEG_COMPRESSION, image, severity)
  decode.from_array(image).save(file, "JPEG", quality=quality)
  return np.array(Image.open(file)).reshape(image.shape)


def saturate(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Scales the saturation of HSV; deterministic.

  Grey pixels of a colour image turn red where saturation is added: their hue
  is 0, as in the authors' conversion.

  Raises:
    ValueError: for a grey image, which has no saturation.
  """
  if image.shape[-1] != 3:
    raise ValueError(
      "saturate wants colour images [h, w, 3]; these are grey: leave it out"
    )
  factor, offset = base.level(SATURATE, image, severity)
  x = base.unit(image)
  value = x.max(-1, keepdims=True)
  chroma = value - x.min(-1, keepdims=True)
  # Each channel is value * (1 - saturation * lack); the hue sets the lacks.
  red = np.broadcast_to([0.0, 1.0, 1.0], x.shape)
  lack = np.divide(value - x, chroma, out=red.copy(), where=chroma > 0)
  saturation = chroma / np.maximum(value, 1 / 255)
  more = np.clip(factor * saturation + offset, 0, 1)
  return base.pixels(value * (1 - more * lack))
