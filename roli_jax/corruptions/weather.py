"""Weather: snow, frost, fog, brightness and spatter. Tables: see base.Table.

All take a generator, an image (uint8 [h, w, 1] or [h, w, 3]) and a severity
(1 to 5), and return an image of the same shape. What has a colour comes to
grey images as the mean of its channels.
"""

from collections.abc import Sequence

import numpy as np

from roli_jax.corruptions import base, blur
from roli_jax.corruptions.base import Bytes, Field, Rng
from roli_jax.types import Bool

# Mean and deviation of flakes, enlargement, threshold, radius and deviation
# of their fall, share of the image that is not whitened.
SNOW = {
  32: (
    (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
    (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
    (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
    (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
    (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
  ),
  64: (
    (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
    (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
    (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
    (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
    (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
  ),
  224: (
    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
  ),
}
FROST = {  # weight of the image, weight of the frost
  32: ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
  64: ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
  224: ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
}
FOG = {  # thickness, how much smoother the fog is with each doubling of scale
  32: ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
  64: ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
  224: ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
}
BRIGHTNESS = {  # added to the value of HSV
  32: (0.05, 0.1, 0.15, 0.2, 0.3),
  64: (0.1, 0.2, 0.3, 0.4, 0.5),
  224: (0.1, 0.2, 0.3, 0.4, 0.5),
}
# Mean and deviation of the liquid, deviation of its blur, threshold, opacity
# (of mud: deviation of its edge), whether it is mud.
SPATTER = {
  32: (
    (0.62, 0.1, 0.7, 0.7, 0.5, False),
    (0.65, 0.1, 0.8, 0.7, 0.5, False),
    (0.65, 0.3, 1, 0.69, 0.5, False),
    (0.65, 0.1, 0.7, 0.69, 0.6, True),
    (0.65, 0.1, 0.5, 0.68, 0.6, True),
  ),
  64: (
    (0.62, 0.1, 0.7, 0.7, 0.6, False),
    (0.65, 0.1, 0.8, 0.7, 0.6, False),
    (0.65, 0.3, 1, 0.69, 0.6, False),
    (0.65, 0.1, 0.7, 0.68, 0.6, True),
    (0.65, 0.1, 0.5, 0.67, 0.6, True),
  ),
  224: (
    (0.65, 0.3, 4, 0.69, 0.6, False),
    (0.65, 0.3, 3, 0.68, 0.6, False),
    (0.65, 0.3, 2, 0.68, 0.5, False),
    (0.65, 0.3, 1, 0.65, 1.5, True),
    (0.67, 0.4, 1, 0.65, 1.5, True),
  ),
}

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
WATER = (175, 238, 238)
MUD = (63, 42, 20)
# The mean colour of the authors' photographs of frost over its own mean.
ICE = (0.89, 1.02, 1.09)


def snow(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Whitens the image and lets flakes fall on it, at -45 to 45 degrees.

  Flakes are enlarged noise above a threshold, in a trail; they are laid on
  twice, the second time turned by half.
  """
  mean, scale, factor, threshold, radius, sigma, share = base.level(
    SNOW, image, severity
  )
  x = base.unit(image)
  flakes = blur.enlarge(rng.normal(mean, scale, x.shape[:2]), factor)
  # In bytes between the steps, as the authors have them.
  flakes = base.unit(base.pixels(np.where(flakes < threshold, 0, flakes)))
  flakes = blur.trail(flakes, radius, sigma, rng.uniform(-135, -45))
  flakes = base.unit(base.pixels(flakes))[..., None]
  grey = x @ np.array(LUMA)[:, None] if x.shape[-1] == 3 else x
  x = share * x + (1 - share) * np.maximum(x, 1.5 * grey + 0.5)
  return base.pixels(x + flakes + flakes[::-1, ::-1])


def frost(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Adds ice crystals, with the published weights.

  Not the published frost: that is cut from photographs. Ours is drawn, needles
  on plates of uneven thickness, about as bright, as uneven and as blue.
  """
  keep, ice = base.level(FROST, image, severity)
  crystals = _crystals(rng, *image.shape[:2])[..., None]
  return base.pixels(
    keep * base.unit(image) + ice * np.clip(crystals * _tone(ICE, image), 0, 1)
  )


def _crystals(rng: Rng, height: int, width: int) -> Field:
  """Draws frost with the mean and deviation of the photographs' brightness."""
  radius = max(2, min(height, width) // 16)
  reach = 2 * radius  # of a needle: none is to end at the border
  seeds = rng.normal(size=(6, height + 2 * reach, width + 2 * reach))
  turns = rng.uniform(0, 60) + 60 * np.arange(6)  # ice grows in six directions
  needles = np.max(
    [
      blur.trail(layer, radius, radius, turn)[reach:-reach, reach:-reach]
      for layer, turn in zip(seeds, turns, strict=True)
    ],
    axis=0,
  )
  plates = plasma(rng, height, width, 1.6)
  layers = [(a - a.mean()) / a.std() for a in (needles, plates)]
  return rng.uniform(0.48, 0.81) + 0.1 * layers[0] + 0.08 * layers[1]


def fog(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Adds a plasma and scales back to the image's largest value."""
  thickness, decay = base.level(FOG, image, severity)
  x, (height, width) = base.unit(image), image.shape[:2]
  mist = thickness * plasma(rng, height, width, decay)[..., None]
  return base.pixels((x + mist) * x.max() / (x.max() + thickness))


def plasma(rng: Rng, height: int, width: int, decay: float | int) -> Field:
  """Draws a random field in [0, 1], smooth from afar and from near.

  By diamonds and squares (Fournier, Fussell and Carpenter 1982) on a torus
  whose side is a power of two, of which a corner is cut.

  Args:
    rng: draws the displacements.
    height: the field's height in pixels.
    width: its width in pixels.
    decay: each halving of the step divides the displacements by its square.
  """
  side = step = 2 ** (max(height, width) - 1).bit_length()
  field, scale = np.zeros((side, side)), 1.0

  def displaced(a: Field, b: Field, c: Field, d: Field) -> Field:
    mean = (a + b + c + d) / 4
    return mean + rng.uniform(-scale, scale, mean.shape)

  while step > 1:
    half = step // 2
    corners = field[::step, ::step]
    below, right = np.roll(corners, -1, 0), np.roll(corners, -1, 1)
    middles = displaced(corners, below, right, np.roll(below, -1, 1))
    above, left = np.roll(middles, 1, 0), np.roll(middles, 1, 1)
    field[half::step, half::step] = middles
    field[::step, half::step] = displaced(corners, right, middles, above)
    field[half::step, ::step] = displaced(corners, below, middles, left)
    step, scale = half, scale / decay**2
  return ((field - field.min()) / np.ptp(field))[:height, :width]


def brightness(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Raises the value of HSV, which is the largest channel; deterministic."""
  x = base.unit(image)
  value = x.max(-1, keepdims=True)
  more = np.minimum(value + base.level(BRIGHTNESS, image, severity), 1)
  # Hue and saturation stay: the channels keep their ratios. Black turns grey.
  ratios = np.divide(x, value, out=np.ones_like(x), where=value > 0)
  return base.pixels(ratios * more)


def spatter(rng: Rng, image: Bytes, severity: int) -> Bytes:
  """Lays drops of water (severities 1 to 3) or of mud on the lens.

  Water is not quite the published one: the authors find the rims of drops by
  OpenCV's Canny, and its approximate distances to them; ours are the pixels at
  a drop's border, and Euclidean. In mean square the image moves by as much, to
  a sixth.
  """
  mean, scale, sigma, threshold, strength, is_mud = base.level(
    SPATTER, image, severity
  )
  x = base.unit(image)
  liquid = base.soften(rng.normal(mean, scale, x.shape[:2]), sigma)
  if is_mud:
    mud = base.soften(1.0 * (liquid > threshold), strength)[..., None]
    mud[mud < 0.8] = 0
    return base.pixels((1 - mud) * x + mud * _tone(MUD, image) / 255)
  drops = liquid >= threshold
  water = np.where(drops, liquid * _relief(drops), 0)[..., None]
  water *= strength / max(water.max(), 1)  # 1: there may be no drops
  return base.pixels(x + water * _tone(WATER, image) / 255)


def _relief(drops: Bool[np.ndarray, "h w"]) -> Field:
  """Lights drops from below on the right; returns values from 0 to 255."""
  from scipy import ndimage

  def box(x: np.ndarray) -> np.ndarray:
    return ndimage.uniform_filter(x, 3, mode="mirror")

  rims = drops & ~ndimage.binary_erosion(drops, border_value=1)
  depth = np.minimum(ndimage.distance_transform_edt(~rims), 20)
  emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
  lit = ndimage.correlate(
    _equalised(box(depth).astype(np.uint8)), emboss, mode="mirror"
  )
  return np.rint(box(np.clip(lit, 0, 255)))


def _equalised(grey: np.ndarray) -> np.ndarray:
  """Equalizes the histogram of bytes; returns values from 0 to 255."""
  counts = np.bincount(grey.ravel(), minlength=256)
  lowest = counts[grey.min()]
  ranks = (counts.cumsum() - lowest) / max(1, grey.size - lowest)
  return np.rint(255 * ranks)[grey]


def _tone(colour: Sequence[float | int], image: Bytes) -> np.ndarray:
  """Returns a colour as this image has it: its mean, if the image is grey."""
  tone = np.array(colour)
  return tone if image.shape[-1] == 3 else tone.mean(keepdims=True)
