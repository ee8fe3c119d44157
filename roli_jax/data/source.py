"""What a data set is to the rest: numbered images with labels."""

import dataclasses
from typing import Any

import numpy as np

SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Source:
  """One split of a data set, in memory.

  Attributes:
    images: uint8, [n, h, w, c]; a pixel is its value over `white`.
    labels: int32, [n], within [0, num_classes).
    indices: uint32, [n], who each image is in the whole data set. Random keys
      are folded from it, so it must not depend on the split's order.
    num_classes: of the data set.
    white: the value of a white pixel, 255 for photographs.
  """

  images: np.ndarray
  labels: np.ndarray
  indices: np.ndarray
  num_classes: int
  white: int = 255

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, i: int) -> dict[str, Any]:
    return {
      "image": self.images[i],
      "label": self.labels[i],
      "index": self.indices[i],
    }

  def pixels(self) -> np.ndarray:
    """All images as float32 in [0, 1]."""
    return self.images.astype(np.float32) / np.float32(self.white)

  def subset(self, size: int, seed: int) -> "Source":
    """That many images, drawn by the seed, with the classes' shares kept.

    Raises:
      ValueError: if there are not as many, or fewer than one of each class.
    """
    if size == len(self):
      return self
    if not self.num_classes <= size < len(self):
      raise ValueError(
        f"train_size must be between {self.num_classes} (one image of each"
        f" class) and {len(self)}, got {size}"
      )
    rows, _ = stratified(self.labels, size, len(self) - size, seed)
    return self.take(rows)

  def take(self, rows: np.ndarray) -> "Source":
    """The images at these positions."""
    return dataclasses.replace(
      self,
      images=self.images[rows],
      labels=self.labels[rows],
      indices=self.indices[rows],
    )


def stratified(
  labels: np.ndarray, first: int, second: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Disjoint positions, as many as asked for, each with the classes' shares."""
  from sklearn import model_selection

  positions = np.arange(len(labels))
  a, b = model_selection.train_test_split(
    positions,
    train_size=first,
    test_size=second,
    stratify=labels,
    random_state=seed,
  )
  return np.sort(a), np.sort(b)
