"""Augmentations and crops: `(rng, image) -> image`, on PIL images.

A chain is a tuple of strings, `("resize:256", "random_crop:224", "flip")`, in
the order in which they are applied. All chance comes from the generator that
is handed in. Rounding is torchvision's; what lies outside an image is black.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np

from roli_jax import specs

Size = tuple[int, int]  # height, width
Rng = np.random.Generator

PHOTO_TRAIN = ("resize:256", "random_crop:224", "flip")
PHOTO_EVAL = ("resize:256", "center_crop:224")

# Of "A Guide to Robust Generalization" (arXiv 2508.14079): nothing is cut.
GUIDE_TRAIN = ("stretch:224", "flip", "color_jitter:0.25", "rotate:2")
GUIDE_EVAL = ("stretch:224",)


@dataclasses.dataclass(frozen=True)
class Transform:
  """What all have: an example of its name, and the size of what comes out."""

  example: ClassVar[str]
  needs_colour: ClassVar[bool] = False

  def __call__(self, rng: Rng, image: Any) -> Any:
    raise NotImplementedError

  def size(self, size: Size | None) -> Size | None:
    """The image's size after it, from that before; None: it is not known."""
    return size


@dataclasses.dataclass(frozen=True)
class Resize(Transform):
  """The shorter side becomes `side`; bilinear, antialiased by PIL."""

  side: int
  example: ClassVar[str] = "resize:256"

  def __call__(self, rng: Rng, image: Any) -> Any:
    from PIL import Image

    width, height = image.size
    height, width = self._sides(height, width)
    if (width, height) == image.size:
      return image
    return image.resize((width, height), Image.Resampling.BILINEAR)

  def size(self, size: Size | None) -> Size | None:
    return size and self._sides(*size)

  def _sides(self, height, width):
    if width <= height:
      return int(self.side * height / width), self.side
    return self.side, int(self.side * width / height)


@dataclasses.dataclass(frozen=True)
class Stretch(Transform):
  """Both sides become `side`, the shape lost; bilinear, antialiased by PIL."""

  side: int
  example: ClassVar[str] = "stretch:224"

  def __call__(self, rng: Rng, image: Any) -> Any:
    from PIL import Image

    return image.resize((self.side, self.side), Image.Resampling.BILINEAR)

  def size(self, size: Size | None) -> Size | None:
    return self.side, self.side


@dataclasses.dataclass(frozen=True)
class Crop(Transform):
  """A square; of an image that is smaller, the middle of a black one."""

  side: int

  def size(self, size: Size | None) -> Size | None:
    return self.side, self.side

  def _cut(self, image, start: Callable[[int], int]):
    """Starts where `start` says of the pixels left over in a direction."""
    left, top = (
      start(extent - self.side)
      if extent >= self.side
      else -((self.side - extent) // 2)
      for extent in image.size
    )
    return image.crop((left, top, left + self.side, top + self.side))


@dataclasses.dataclass(frozen=True)
class CenterCrop(Crop):
  """The square in the middle."""

  example: ClassVar[str] = "center_crop:224"

  def __call__(self, rng: Rng, image: Any) -> Any:
    return self._cut(image, lambda over: round(over / 2))


@dataclasses.dataclass(frozen=True)
class RandomCrop(Crop):
  """A square anywhere."""

  example: ClassVar[str] = "random_crop:224"

  def __call__(self, rng: Rng, image: Any) -> Any:
    return self._cut(image, lambda over: int(rng.integers(over + 1)))


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(Transform):
  """8 to 100% of the area, sides 3:4 to 4:3, resized to a square."""

  side: int
  example: ClassVar[str] = "random_resized_crop:224"

  def __call__(self, rng: Rng, image: Any) -> Any:
    from PIL import Image

    box = _box(rng, *image.size)
    size = (self.side, self.side)
    return image.crop(box).resize(size, Image.Resampling.BILINEAR)

  def size(self, size: Size | None) -> Size | None:
    return self.side, self.side


def _box(rng, width, height):
  """Left, top, right and bottom of a random crop, as torchvision draws it."""
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


@dataclasses.dataclass(frozen=True)
class Flip(Transform):
  """Every other image, by chance, has left and right exchanged."""

  example: ClassVar[str] = "flip"

  def __call__(self, rng: Rng, image: Any) -> Any:
    from PIL import Image

    if rng.random() < 0.5:
      return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


@dataclasses.dataclass(frozen=True)
class Rotate(Transform):
  """Turned by up to `degrees` either way, nearest pixels, black coming in."""

  degrees: float
  example: ClassVar[str] = "rotate:2"

  def __call__(self, rng: Rng, image: Any) -> Any:
    return image.rotate(rng.uniform(-self.degrees, self.degrees))


@dataclasses.dataclass(frozen=True)
class PadCrop(Transform):
  """Moved by up to `pad` pixels in each direction, black coming in."""

  pad: int
  example: ClassVar[str] = "pad_crop:4"

  def __call__(self, rng: Rng, image: Any) -> Any:
    left, top = rng.integers(-self.pad, self.pad + 1, 2).tolist()
    width, height = image.size
    return image.crop((left, top, left + width, top + height))


@dataclasses.dataclass(frozen=True)
class Cutout(Transform):
  """A black square around a random pixel (DeVries and Taylor 2017)."""

  side: int
  example: ClassVar[str] = "cutout:8"

  def __call__(self, rng: Rng, image: Any) -> Any:
    width, height = image.size
    x, y = int(rng.integers(width)), int(rng.integers(height))
    left, top = x - self.side // 2, y - self.side // 2
    box = (
      max(left, 0),
      max(top, 0),
      min(left + self.side, width),
      min(top + self.side, height),
    )
    image = image.copy()
    image.paste(0 if image.mode == "L" else (0, 0, 0), box)
    return image


@dataclasses.dataclass(frozen=True)
class ColorJitter(Transform):
  """Brightness, contrast and saturation in random order.

  Each by a factor between 1 - strength and 1 + strength.
  """

  strength: float
  example: ClassVar[str] = "color_jitter:0.4"
  needs_colour: ClassVar[bool] = True

  def __post_init__(self):
    if self.strength > 1:
      raise ValueError(f"strength must be <= 1, got {self.strength}")

  def __call__(self, rng: Rng, image: Any) -> Any:
    for i in rng.permutation(3):
      factor = rng.uniform(1 - self.strength, 1 + self.strength)
      image = _enhance(("Brightness", "Contrast", "Color")[i], image, factor)
    return image


@dataclasses.dataclass(frozen=True)
class RandAugment(Transform):
  """So many of 14 operations, by chance, at one magnitude of 0 to 30.

  Cubuk et al. 2020; operations and ranges are torchvision's, nearest pixels.
  """

  num_ops: int
  magnitude: int
  example: ClassVar[str] = "rand_augment:2,9"
  needs_colour: ClassVar[bool] = True

  def __post_init__(self):
    if self.magnitude > 30:
      raise ValueError(f"magnitude must be <= 30, got {self.magnitude}")

  def __call__(self, rng: Rng, image: Any) -> Any:
    for _ in range(self.num_ops):
      operation = OPERATIONS[rng.integers(len(OPERATIONS))]
      sign = 1 if rng.random() < 0.5 else -1
      image = operate(operation, image, self.magnitude / 30, sign)
    return image


OPERATIONS = (
  "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate",
  "Brightness", "Color", "Contrast", "Sharpness", "Posterize", "Solarize",
  "AutoContrast", "Equalize",
)  # fmt: skip


def operate(name: str, image: Any, share: float, sign: int) -> Any:
  """One operation of RandAugment.

  Args:
    name: a name in `OPERATIONS`.
    image: of PIL, RGB.
    share: of the largest magnitude, 0 to 1.
    sign: 1 or -1, of those operations that have two directions.
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
    # From the threshold on; less what a product of floats has too much.
    return ImageOps.solarize(image, math.ceil(255 - 255 * share - 1e-6))
  if name == "AutoContrast":
    return ImageOps.autocontrast(image)
  return ImageOps.equalize(image) if name == "Equalize" else image


def _enhance(name, image, factor):
  from PIL import ImageEnhance

  return getattr(ImageEnhance, name)(image).enhance(factor)


TRANSFORMS: dict[str, type[Transform]] = {
  "center_crop": CenterCrop,
  "color_jitter": ColorJitter,
  "cutout": Cutout,
  "flip": Flip,
  "pad_crop": PadCrop,
  "rand_augment": RandAugment,
  "random_crop": RandomCrop,
  "random_resized_crop": RandomResizedCrop,
  "resize": Resize,
  "rotate": Rotate,
  "stretch": Stretch,
}

Chain = tuple[Transform, ...]


def build(texts: Iterable[str]) -> Chain:
  """The transforms that `name:argument` strings mean.

  Raises:
    ValueError: an unknown name, or an argument that it does not take.
  """
  if isinstance(texts, str):
    raise ValueError(f"transforms are a tuple of strings, got {texts!r}")
  return tuple(_parse(text) for text in texts)


def _parse(text):
  name, colon, rest = text.partition(":")
  make = specs.lookup(TRANSFORMS, name, "transform")
  fields = dataclasses.fields(make)
  words = rest.split(",") if colon else []
  try:
    values = [
      field.type(word) for field, word in zip(fields, words, strict=True)
    ]
    if any(not 0 <= v < math.inf or (v == 0 and i == 0)
           for i, v in enumerate(values)):  # fmt: skip
      raise ValueError("the first number must be positive, none negative")
    return make(*values)
  except ValueError as error:
    raise ValueError(
      f"{name} is written like {make.example!r}, got {text!r} ({error})"
    ) from error


def size(chain: Chain, before: Size | None) -> Size | None:
  """The size that a chain ends at; None where it depends on the image."""
  for transform in chain:
    before = transform.size(before)
  return before


def check(
  train: Chain, held: Chain, before: Size | None, channels: int
) -> None:
  """Raises a ValueError if the chains do not fit each other or the images.

  Args:
    train: the chain of training.
    held: the chain of what is held out, validation and tests.
    before: the images' height and width, None if they have many.
    channels: 1 for grey, 3 for colour.
  """
  for transform in (*train, *held):
    if transform.needs_colour and channels != 3:
      raise ValueError(
        f"{transform.example.partition(':')[0]} wants colour images of 0 to"
        " 255, these are grey"
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


def apply(chain: Chain, rng: Rng, image: Any) -> np.ndarray:
  """The image after the chain, uint8 [h, w, c]."""
  for transform in chain:
    image = transform(rng, image)
  array = np.asarray(image)
  return array[..., None] if array.ndim == 2 else array
