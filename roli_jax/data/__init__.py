"""Data sets by name."""

import functools
from collections.abc import Callable

from roli_jax import specs
from roli_jax.data import glyphs, tfds
from roli_jax.data.pipeline import train_batches
from roli_jax.data.source import SPLITS, Source

SOURCES: dict[str, Callable[[str], Source]] = {
  "cifar10": functools.partial(tfds.cifar, "cifar10"),
  "cifar100": functools.partial(tfds.cifar, "cifar100"),
  "digits": glyphs.digits,
  "letters": glyphs.letters,
}


def build(name: str, split: str) -> Source:
  """A split (`train`, `val` or `test`) of the data set of that name.

  Raises:
    ValueError: an unknown name, or data that is not there, with the command
      that prepares it.
  """
  if split not in SPLITS:
    raise ValueError(f"unknown split {split!r}; there are {SPLITS}")
  return specs.choose(SOURCES, name, "data set")(split)


__all__ = ["SOURCES", "SPLITS", "Source", "build", "train_batches"]
