"""The embedded data: letters rendered from fonts, and handwritten digits.

Digits are scikit-learn's: 1,797 of 8 x 8 pixels with values 0 to 16, which
count the dark pixels in 4 x 4 blocks of a 32 x 32 bitmap (Alpaydin and Kaynak
1998). Letters are made the same way from the fonts that matplotlib ships, so
that a backbone pretrained on them sees images of the same kind with other
classes.
"""

import functools
import math
import pathlib

import numpy as np

from roli_jax.data import source
from roli_jax.data.decode import Picture
from roli_jax.files import extras
from roli_jax.types import Integer

# The upper case, and the lower-case letters that look unlike it: the letter
# classes of EMNIST "balanced" (Cohen et al. 2017).
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"

DIGIT_SIZES = {"train": 1000, "val": 297, "test": 500}
LETTER_SIZES = {"train": 74_000, "val": 1_110, "test": 3_700}

_SIDE = 32  # pixels of the bitmap, each way
_BLOCK = 4  # bitmap pixels that make one pixel of the image, each way
_EM = 64  # pixels of the em square in which a glyph is drawn before it is bent
_STROKES = (1, 2, 3, 4)  # by how much outlines are widened, in drawn pixels


def digits(split: str) -> source.Source:
  """Loads scikit-learn's digits: 10 classes, 1,000 train, 297 val, 500 test.

  The split is stratified and fixed.

  Args:
    split: `train`, `val` or `test`.
  """
  extras.need("sklearn")
  from sklearn import datasets

  bunch = datasets.load_digits()
  whole = source.Source(
    images=bunch.images.astype(np.uint8)[..., None],
    labels=bunch.target.astype(np.int32),
    indices=np.arange(len(bunch.target), dtype=np.uint32),
    num_classes=10,
    classes=tuple("0123456789"),
    white=_BLOCK**2,
  )
  train, val, test = DIGIT_SIZES.values()
  rest, held = source.stratified(whole.labels, train + val, test, seed=2024)
  pool, mid = source.stratified(whole.labels[rest], train, val, seed=2024)
  rows = {"train": rest[pool], "val": rest[mid], "test": held}
  return whole.take(rows[split])


@functools.cache
def letters(split: str) -> source.Source:
  """Renders letters, 37 classes in equal shares.

  74,000 train, 1,110 val and 3,700 test images, each drawn from its index when
  the split is asked for (15 seconds for train), the same on every machine with
  the same versions of matplotlib and Pillow.

  Args:
    split: `train`, `val` or `test`.
  """
  extras.need("PIL", "matplotlib")
  start = sum(list(LETTER_SIZES.values())[: source.SPLITS.index(split)])
  indices = np.arange(start, start + LETTER_SIZES[split], dtype=np.uint32)
  labels = (indices % len(LETTERS)).astype(np.int32)
  pairs = zip(indices, labels, strict=True)
  return source.Source(
    images=np.stack([_letter(int(i), int(label)) for i, label in pairs]),
    labels=labels,
    indices=indices,
    num_classes=len(LETTERS),
    classes=tuple(LETTERS),
    white=_BLOCK**2,
  )


@functools.cache
def fonts() -> tuple[str, ...]:
  """Finds the files of matplotlib's fonts that have all the letters.

  A font has a letter if its glyph goes by the letter's name: fonts of symbols
  map letters to something else.
  """
  extras.need("matplotlib")
  import matplotlib
  from matplotlib import ft2font

  def has_letters(path: str) -> bool:
    font = ft2font.FT2Font(path)
    glyphs = font.get_charmap()
    return all(
      ord(c) in glyphs and font.get_glyph_name(glyphs[ord(c)]) == c
      for c in LETTERS
    )

  folder = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf")
  paths = sorted(str(path) for path in folder.glob("*.ttf"))
  return tuple(path for path in paths if has_letters(path))


@functools.cache
def _glyph(font: str, letter: str, stroke: int) -> Picture:
  """Draws a letter large and crops it to its ink."""
  from PIL import Image, ImageDraw, ImageFont

  image = Image.new("L", (3 * _EM, 3 * _EM))
  ImageDraw.Draw(image).text(
    (_EM, _EM // 2),
    letter,
    fill=255,
    font=ImageFont.truetype(font, _EM),
    stroke_width=stroke,
  )
  return image.crop(image.getbbox())


def _letter(index: int, label: int) -> Integer[np.ndarray, "8 8 1"]:
  """Draws uint8: font, stroke, bend and threshold are random."""
  from PIL import Image

  rng = np.random.default_rng(index)
  font = fonts()[rng.integers(len(fonts()))]
  glyph = _glyph(font, LETTERS[label], int(rng.choice(_STROKES)))
  angle = math.radians(rng.normal(0, 8))
  shear = rng.normal(0, 0.15)
  aspect = math.exp(rng.normal(0, 0.15))
  rotate = np.array(
    [
      [math.cos(angle), -math.sin(angle)],
      [math.sin(angle), math.cos(angle)],
    ]
  )
  bend = rotate @ np.array([[1, shear], [0, 1]]) @ np.diag([aspect, 1 / aspect])
  # As in the digits, the ink fills the bitmap's height, or its width.
  width, height = np.abs(bend) @ glyph.size
  fill = rng.uniform(0.9, 1.1) * _SIDE
  bend *= fill / max(height, width)
  shift = rng.uniform(-1.5, 1.5, 2)
  # PIL asks where in the glyph each pixel of the bitmap comes from.
  back = np.linalg.inv(bend)
  offset = np.array(glyph.size) / 2 - back @ (_SIDE / 2 + shift)
  bitmap = glyph.transform(
    (_SIDE, _SIDE),
    Image.Transform.AFFINE,
    (*back[0], offset[0], *back[1], offset[1]),
    Image.Resampling.BILINEAR,
  )
  dark = np.asarray(bitmap) > rng.uniform(80, 175)
  blocks = (_SIDE // _BLOCK, _BLOCK) * 2
  counts = dark.reshape(blocks).sum((1, 3), dtype=np.uint8)
  return counts[..., None]
