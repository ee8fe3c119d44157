"""Augmentations and crops: `(rng, image, ...) -> image`, on PIL images.

A chain is a tuple of strings, `("resize:256", "random_crop:224", "flip")`, in
the order in which they are applied. All chance comes from the generator that
is handed in; the size of what comes out depends on the size alone. Rounding is
torchvision's; what lies outside an image is black.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from roli_jax import specs
from roli_jax.data.decode import Picture
from roli_jax.files import extras
from roli_jax.types import Integer

Size = tuple[int, int]  # height, width
Rng = np.random.Generator
Chain = tuple[functools.partial, ...]  # each `(rng, image) -> image`

PHOTO_TRAIN = ("resize:256", "random_crop:224", "flip")
PHOTO_EVAL = ("resize:256", "center_crop:224")

# Those of "A Guide to Robust Generalization" (arXiv 2508.14079), which cut
# nothing off.
GUIDE_TRAIN = ("stretch:224", "flip", "color_jitter:0.25", "rotate:2")
GUIDE_EVAL = ("stretch:224",)


def resize(rng: Rng, image: Picture, side: int) -> Picture:
  """Resizes the shorter side to `side`; bilinear, antialiased by PIL."""
  return _resized(image, *_shorter(image, side))


def resize_bicubic(rng: Rng, image: Picture, side: int) -> Picture:
  """Resizes the shorter side to `side`; bicubic, antialiased by PIL."""
  from PIL import Image

  return image.resize(_shorter(image, side), Image.Resampling.BICUBIC)


def _shorter(image: Picture, side: int) -> tuple[int, int]:
  """Returns width and height of an image whose shorter side is `side`."""
  width, height = image.size
  if width <= height:
    return side, int(side * height / width)
  return int(side * width / height), side


def stretch(rng: Rng, image: Picture, side: int) -> Picture:
  """Resizes both sides to `side`, the shape lost; bilinear, antialiased."""
  return _resized(image, side, side)


def _resized(image: Picture, width: int, height: int) -> Picture:
  from PIL import Image

  return image.resize((width, height), Image.Resampling.BILINEAR)


def center_crop(rng: Rng, image: Picture, side: int) -> Picture:
  """Crops the square in the middle; pads what is smaller with black."""
  return _cut(image, side, lambda over: round(over / 2))


def random_crop(rng: Rng, image: Picture, side: int) -> Picture:
  """Crops a square anywhere; pads what is smaller with black, evenly."""
  return _cut(image, side, lambda over: int(rng.integers(over + 1)))


def _cut(image: Picture, side: int, start: Callable[[int], int]) -> Picture:
  """Crops a square that starts at `start` of the pixels left over each way."""
  left, top = (
    start(extent - side) if extent >= side else -((side - extent) // 2)
    for extent in image.size
  )
  return image.crop((left, top, left + side, top + side))


def random_resized_crop(rng: Rng, image: Picture, side: int) -> Picture:
  """Crops 8 to 100% of the area, sides 3:4 to 4:3; resizes it to a square."""
  return stretch(rng, image.crop(_box(rng, *image.size)), side)


def _box(rng: Rng, width: int, height: int) -> tuple[int, int, int, int]:
  """Draws left, top, right and bottom of a crop, as torchvision does."""
  for _ in range(10):
    area = width * height * rng.uniform(0.08, 1)
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      left = int(rng.integers(width - w + 1))
      top = int(rng.integers(height - h + 1))
      return left, top, left + w, top + h
  # None fits in ten tries: the middle, as near to the allowed shapes as it is.
  w = max(1, min(width, round(height * 4 / 3)))
  h = max(1, min(height, round(width * 4 / 3)))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def flip(rng: Rng, image: Picture) -> Picture:
  """Exchanges left and right in half of the images, by chance."""
  from PIL import Image

  if rng.random() < 0.5:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return image


def rotate(rng: Rng, image: Picture, degrees: float) -> Picture:
  """Turns by up to `degrees` either way; nearest pixels, black coming in."""
  return image.rotate(rng.uniform(-degrees, degrees))


def pad_crop(rng: Rng, image: Picture, pad: int) -> Picture:
  """Moves by up to `pad` pixels in each direction, black coming in."""
  left, top = rng.integers(-pad, pad + 1, 2).tolist()
  width, height = image.size
  return image.crop((left, top, left + width, top + height))


def cutout(rng: Rng, image: Picture, side: int) -> Picture:
  """Blackens a square around a random pixel (DeVries and Taylor 2017)."""
  width, height = image.size
  x, y = int(rng.integers(width)), int(rng.integers(height))
  left, top = x - side // 2, y - side // 2
  right, bottom = min(left + side, width), min(top + side, height)
  image = image.copy()
  black = 0 if image.mode == "L" else (0, 0, 0)
  image.paste(black, (max(left, 0), max(top, 0), right, bottom))
  return image


def color_jitter(rng: Rng, image: Picture, strength: float) -> Picture:
  """Changes brightness, contrast and saturation, in random order.

  Each by a factor between 1 - strength and 1 + strength; strength is at most 1.
  """
  for i in rng.permutation(3):
    factor = rng.uniform(1 - strength, 1 + strength)
    image = _enhance(("Brightness", "Contrast", "Color")[i], image, factor)
  return image


def rand_augment(
  rng: Rng, image: Picture, num_ops: int, magnitude: int
) -> Picture:
  """Applies `num_ops` of 14 operations, by chance, at one magnitude of 0 to 30.

  Cubuk et al. 2020; operations and ranges are torchvision's, nearest pixels.
  """
  for _ in range(num_ops):
    operation = OPERATIONS[rng.integers(len(OPERATIONS))]
    sign = 1 if rng.random() < 0.5 else -1
    image = operate(operation, image, magnitude / 30, sign)
  return image


OPERATIONS = (
  "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate",
  "Brightness", "Color", "Contrast", "Sharpness", "Posterize", "Solarize",
  "AutoContrast", "Equalize",
)  # fmt: skip


def operate(name: str, image: Picture, share: float, sign: int) -> Picture:
  """Applies one operation of RandAugment.

  Args:
    name: a name in `OPERATIONS`.
    image: an image of PIL, RGB.
    share: the magnitude as a share of the largest one, 0 to 1.
    sign: 1 or -1, the direction of those operations that have two.
  """
  from PIL import Image, ImageOps

  move, (width, height) = sign * share, image.size
  shifts = {  # x and y of the pixel that comes to stand at (x, y)
    "ShearX": (1, 0.3 * move, 0, 0, 1, 0),
    "ShearY": (1, 0, 0, 0.3 * move, 1, 0),
    "TranslateX": (1, 0, -int(150 / 331 * width * move), 0, 1, 0),
    "TranslateY": (1, 0, 0, 0, 1, -int(150 / 331 * height * move)),
  }
  if name in shifts:
    return image.transform(image.size, Image.Transform.AFFINE, shifts[name])
  if name == "Rotate":
    return image.rotate(30 * move)
  if name in ("Brightness", "Color", "Contrast", "Sharpness"):
    return _enhance(name, image, 1 + 0.9 * move)
  if name == "Posterize":
    return ImageOps.posterize(image, 8 - round(4 * share))
  if name == "Solarize":
    # Rounding may leave the difference just above a whole number, which ceil
    # would raise by one: 1e-6 is taken off before.
    return ImageOps.solarize(image, math.ceil(255 - 255 * share - 1e-6))
  if name == "AutoContrast":
    return ImageOps.autocontrast(image)
  return ImageOps.equalize(image) if name == "Equalize" else image


def _enhance(name: str, image: Picture, factor: float) -> Picture:
  from PIL import ImageEnhance

  return getattr(ImageEnhance, name)(image).enhance(factor)


# How each is written in a config.
TRANSFORMS: dict[Callable[..., Any], str] = {
  center_crop: "center_crop:224",
  color_jitter: "color_jitter:0.4",
  cutout: "cutout:8",
  flip: "flip",
  pad_crop: "pad_crop:4",
  rand_augment: "rand_augment:2,9",
  random_crop: "random_crop:224",
  random_resized_crop: "random_resized_crop:224",
  resize: "resize:256",
  resize_bicubic: "resize_bicubic:256",
  rotate: "rotate:2",
  stretch: "stretch:224",
}
_COLOUR = (color_jitter, rand_augment)  # take no grey images
_MOST = {"strength": 1, "magnitude": 30}  # the largest values of arguments


def build(texts: Iterable[str]) -> Chain:
  """Makes a chain of `name:argument` strings, as a config has them.

  Raises:
    ValueError: an unknown name, or an argument that it does not take.
  """
  if isinstance(texts, str):
    raise ValueError(f"transforms are a tuple of strings, got {texts!r}")
  return tuple(_parse(text) for text in texts)


def _parse(text: str) -> functools.partial:
  name, colon, rest = text.partition(":")
  by_name = {make.__name__: make for make in TRANSFORMS}
  make = specs.lookup(by_name, name, "transform")
  _, _, *fields = inspect.signature(make).parameters.values()
  words = rest.split(",") if colon else []
  try:
    values = {
      field.name: field.annotation(word)
      for field, word in zip(fields, words, strict=True)
    }
    for i, (field, value) in enumerate(values.items()):
      if not 0 <= value < math.inf or (value == 0 and i == 0):
        raise ValueError("the first number must be positive, none negative")
      if value > _MOST.get(field, math.inf):
        raise ValueError(f"{field} must be <= {_MOST[field]}, got {value}")
  except ValueError as error:
    raise ValueError(
      f"{name} is written like {TRANSFORMS[make]!r}, got {text!r} ({error})"
    ) from error
  return functools.partial(make, **values)


def size(chain: Chain, before: Size | None) -> Size | None:
  """Returns the size that a chain ends at; None if it depends on the image.

  Args:
    chain: the transforms, in their order.
    before: height and width before them, in pixels; None: images have many.
  """
  if not chain:
    return before
  extras.need("PIL")
  from PIL import Image

  found: set[Size] = set()
  # Two shapes, one wide and one high, for images of many.
  for height, width in [before] if before else [(40, 90), (97, 31)]:
    image = Image.new("RGB", (width, height))
    found.add(apply(chain, np.random.default_rng(0), image).shape[:2])
  return found.pop() if len(found) == 1 else None


def check(
  train: Chain, held: Chain, before: Size | None, channels: int
) -> None:
  """Raises a ValueError if the chains do not fit each other or the images.

  Args:
    train: the chain for training images.
    held: the chain for validation and test images.
    before: the images' height and width in pixels; None: they have many.
    channels: 1 for grey, 3 for colour.
  """
  for transform in (*train, *held):
    if transform.func in _COLOUR and channels != 3:
      raise ValueError(
        f"{transform.func.__name__} wants colour images of 0 to 255, these are"
        " grey"
      )
  sizes = {"train": size(train, before), "eval": size(held, before)}
  for name, found in sizes.items():
    if found is None:
      raise ValueError(
        f"after data.{name}_transforms the images have many sizes; let them"
        " end with a crop (center_crop, random_crop, random_resized_crop) or"
        " a stretch"
      )
  if sizes["train"] != sizes["eval"]:
    raise ValueError(
      f"images have {sizes['train']} pixels after data.train_transforms and"
      f" {sizes['eval']} after data.eval_transforms; they must be the same"
    )


def apply(
  chain: Chain, rng: Rng, image: Picture
) -> Integer[np.ndarray, "h w c"]:
  """Applies the chain; returns uint8."""
  for transform in chain:
    image = transform(rng, image)
  array = np.asarray(image)
  return array[..., None] if array.ndim == 2 else array
