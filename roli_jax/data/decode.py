"""Files of images, and what is in them: RGB, upright, 8 bits."""

import io
import os
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from roli_jax.files import extras
from roli_jax.types import Integer

if TYPE_CHECKING:  # since PIL comes with an extra
  import PIL.Image

Picture: TypeAlias = "PIL.Image.Image"

# Suffixes of files that are taken for images, in lower case.
SUFFIXES = {
  ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm",
  ".tif", ".tiff", ".webp",
}  # fmt: skip

_ORIENTATION = 0x0112  # the EXIF tag
# The longer side over the shorter, at most: longer images would fill the memory
# once their shorter side is resized to 256 pixels.
_LONGEST = 100


def known() -> set[str]:
  """Returns the suffixes of all formats that PIL opens, taken here or not."""
  from PIL import Image

  Image.init()
  return {s for s, kind in Image.EXTENSION.items() if kind in Image.OPEN}


def decode(path: str | os.PathLike[str] | io.BytesIO) -> Picture:
  """Reads a file's image as RGB.

  The first frame, turned as its EXIF says, 16 bits scaled to 8. Transparency
  is dropped and leaves the colour beneath it, as `convert("RGB")` does.

  Raises:
    Exception: of many types, PIL's and ours: the file is no image, or its image
      is too large.
  """
  extras.need("PIL")
  from PIL import Image

  with Image.open(path) as image:
    width, height = image.size
    limit = Image.MAX_IMAGE_PIXELS
    if limit and width * height > limit:
      raise ValueError(f"{width} x {height} pixels; at most {limit} in all")
    if max(width, height) > _LONGEST * min(width, height):
      raise ValueError(f"{width} x {height} pixels; sides at most 1:{_LONGEST}")
    image.load()
    return _upright(_rgb(image), _orientation(image))


def _orientation(image: Picture) -> int:
  try:
    return image.getexif().get(_ORIENTATION, 1)
  except Exception:  # of any type: EXIF that can't be read says nothing
    return 1


def _upright(image: Picture, orientation: int) -> Picture:
  from PIL import Image

  turn = Image.Transpose
  turns = {
    2: turn.FLIP_LEFT_RIGHT,
    3: turn.ROTATE_180,
    4: turn.FLIP_TOP_BOTTOM,
    5: turn.TRANSPOSE,
    6: turn.ROTATE_270,
    7: turn.TRANSVERSE,
    8: turn.ROTATE_90,
  }
  return image.transpose(turns[orientation]) if orientation in turns else image


def _rgb(image: Picture) -> Picture:
  from PIL import Image

  if image.mode == "RGB":
    return image
  if image.mode.startswith("I"):  # 16 bits, which convert() would clip
    wide = np.asarray(image).astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
      raise ValueError("pixels of more than 16 bits")
    # 65535 = 257 * 255: white stays white.
    image = Image.fromarray(np.round(wide / 257).astype(np.uint8))
  if image.mode == "F":
    raise ValueError("pixels are fractions, whose white is not known")
  if image.mode in ("P", "PA", "LA", "La", "RGBa"):
    image = image.convert("RGBA")
  return image.convert("RGB")


def from_array(array: Integer[np.ndarray, "h w c"]) -> Picture:
  """Makes an image of PIL of uint8, grey if c is 1 and RGB if it is 3."""
  extras.need("PIL")
  from PIL import Image

  return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
