"""What corruptions share: strengths by severity and size, floats and bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from roli_jax.files import extras

Rng = np.random.Generator

# Published for images of 32, 64 and 224 pixels: the strengths of severities 1
# to 5 each. From the authors' github.com/hendrycks/robustness, ImageNet-C/
# create_c: make_cifar_c.py, make_tinyimagenet_c.py and make_imagenet_c.py.
Table = Mapping[int, Sequence[Any]]

SEVERITIES = (1, 2, 3, 4, 5)


def check_severity(severity: int) -> None:
  """Raises a ValueError unless it is one of the five."""
  if severity not in SEVERITIES:
    raise ValueError(f"severity must be 1, 2, 3, 4 or 5, got {severity}")


def at(strengths: Sequence[Any], severity: int) -> Any:
  """The one of five strengths."""
  check_severity(severity)
  return strengths[severity - 1]


def level(table: Table, image: np.ndarray, severity: int) -> Any:
  """The published strength for an image of this size.

  The table is that of CIFAR-10-C below 48 pixels (of the shorter side), of
  Tiny ImageNet-C below 128 and of ImageNet-C from there on; the two borders,
  near the geometric means of 32, 64 and 224, are our own.
  """
  side = min(image.shape[:2])
  return at(table[32 if side < 48 else 64 if side < 128 else 224], severity)


def unit(image: np.ndarray) -> np.ndarray:
  """Bytes as floats in [0, 1]."""
  return image / 255


def pixels(x: np.ndarray) -> np.ndarray:
  """Floats, clipped to [0, 1], as bytes.

  Fractions are cut, as the authors cut them. What a sum of floats lacks of a
  whole number is no fraction.
  """
  return (255 * np.clip(x, 0, 1) + 1e-6).astype(np.uint8)


def soften(x: np.ndarray, sigma: float | int) -> np.ndarray:
  """A Gaussian blur of height and width; edges go on beyond the border."""
  from scipy import ndimage

  return ndimage.gaussian_filter(x, sigma, mode="nearest", axes=(0, 1))


def as_pil(image: np.ndarray) -> Any:
  """The image as PIL has it, grey or colour."""
  extras.need("PIL")
  from PIL import Image

  return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
