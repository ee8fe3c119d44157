"""What corruptions share: strengths by severity and size, floats and bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from roli_jax.types import Float, Integer

Rng = np.random.Generator
Bytes = Integer[np.ndarray, "h w c"]  # uint8; c is 1 or 3
Field = Float[np.ndarray, "h w"]

# Side of the image in pixels (32, 64 or 224) -> the strengths of severities 1
# to 5, as published. From the authors' github.com/hendrycks/robustness,
# ImageNet-C/create_c: make_cifar_c.py, make_tinyimagenet_c.py and
# make_imagenet_c.py.
Table = Mapping[int, Sequence[Any]]

SEVERITIES = (1, 2, 3, 4, 5)


def check_severity(severity: int) -> None:
  """Raises a ValueError unless it is one of the five."""
  if severity not in SEVERITIES:
    raise ValueError(f"severity must be 1, 2, 3, 4 or 5, got {severity}")


def at(strengths: Sequence[Any], severity: int) -> Any:
  """Picks one of five strengths by severity, 1 to 5."""
  check_severity(severity)
  return strengths[severity - 1]


def level(table: Table, image: Bytes, severity: int) -> Any:
  """Picks the published strength for an image of this size.

  The table is that of CIFAR-10-C below 48 pixels (of the shorter side), of
  Tiny ImageNet-C below 128 and of ImageNet-C from there on; the two borders,
  near the geometric means of 32, 64 and 224, are our own.
  """
  side = min(image.shape[:2])
  return at(table[32 if side < 48 else 64 if side < 128 else 224], severity)


def unit(image: Integer[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
  """Scales bytes to floats in [0, 1]."""
  return image / 255


def pixels(x: Float[np.ndarray, "*shape"]) -> Integer[np.ndarray, "*shape"]:
  """Clips floats to [0, 1] and makes them bytes.

  Fractions are cut, as the authors cut them; 1e-6 is added before, so that a
  sum of floats just below a whole number is not cut to the one below.
  """
  return (255 * np.clip(x, 0, 1) + 1e-6).astype(np.uint8)


def soften(
  x: Float[np.ndarray, "h w *c"], sigma: float | int
) -> Float[np.ndarray, "h w *c"]:
  """Blurs height and width by a Gaussian; edges go on beyond the border."""
  from scipy import ndimage

  return ndimage.gaussian_filter(x, sigma, mode="nearest", axes=(0, 1))
