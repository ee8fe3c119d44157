"""What a data set is to the rest: numbered images with labels."""

import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Callable

import numpy as np

from roli_jax.data import decode, transforms
from roli_jax.files import extras
from roli_jax.types import Float, Integer

SPLITS = ("train", "val", "test")

# Bytes of transformed images that a source keeps for the next time, 4 GiB; a
# larger split is decoded again.
KEEP = 4 * 2**30


class Missing(ValueError):
  """Data is not where it must lie; the message says how to get it there."""


@dataclasses.dataclass(frozen=True)
class Source:
  """One split of a data set, in memory.

  Attributes:
    images: uint8, [n, h, w, c]; a pixel is its value over `white`.
    labels: int32, [n], within [0, num_classes).
    indices: uint32, [n], each image's number in the whole data set. Random keys
      are folded from it, so it must not depend on the split's order.
    num_classes: the number of classes in the data set.
    white: the value of a white pixel, 255 for photographs.
    split: `train`, `val` or `test`.
    classes: names of the classes, in the order of labels; () if they have none.
    train_transforms: applied to images for training.
    eval_transforms: applied to images for everything else.
    skipped: how many files were left out because they are bad, or copies of
      others.
    notes: what a user should know of the data, a line each.
  """

  images: np.ndarray
  labels: np.ndarray
  indices: np.ndarray
  num_classes: int
  white: int = 255
  split: str = ""
  classes: tuple[str, ...] = ()
  train_transforms: transforms.Chain = ()
  eval_transforms: transforms.Chain = ()
  skipped: int = 0
  notes: tuple[str, ...] = ()
  _kept: dict[int, np.ndarray] = dataclasses.field(
    default_factory=dict, init=False, repr=False, compare=False
  )

  def __len__(self) -> int:
    return len(self.images)

  @property
  def shape(self) -> tuple[int, int, int]:
    """Height, width and channels of an image as it is attacked."""
    height, width, channels = self.images.shape[1:]
    size = transforms.size(self.eval_transforms, (height, width))
    assert size is not None, "checked when the source was built"
    return (*size, channels)

  @property
  def is_plain(self) -> bool:
    """Whether the arrays are already what training takes."""
    return not self.train_transforms

  def picture(self, row: int) -> decode.Picture:
    """Returns the image at this position, before any transform."""
    return decode.from_array(self.images[row])

  def train_image(
    self, row: int, rng: np.random.Generator
  ) -> Integer[np.ndarray, "h w c"]:
    """Augments one image; returns uint8."""
    return transforms.apply(self.train_transforms, rng, self.picture(row))

  def pixels(
    self, rows: slice | np.ndarray = slice(None)
  ) -> Float[np.ndarray, "n h w c"]:
    """Returns images for evaluation, float32 in [0, 1].

    What had to be decoded or transformed is kept as uint8, so that the next
    time is quick, unless all of the split would take more than KEEP bytes.

    Args:
      rows: positions in the split; an image takes 4 h w c bytes.
    """
    return np.divide(
      self._views(rows), np.float32(self.white), dtype=np.float32
    )

  def _views(self, rows: slice | np.ndarray) -> Integer[np.ndarray, "n h w c"]:
    """Applies the eval transforms; returns uint8."""
    if not self.eval_transforms:
      return self.images[rows]
    wanted = np.arange(len(self))[rows].tolist()
    views = np.empty((len(wanted), *self.shape), np.uint8)

    def fill(view: np.ndarray, row: int) -> None:
      if row in self._kept:
        view[:] = self._kept[row]
        return
      # The transforms of evaluation may be random: then by the image alone.
      rng = np.random.default_rng(self.indices[row])
      picture = self.picture(row)
      view[:] = transforms.apply(self.eval_transforms, rng, picture)

    with concurrent.futures.ThreadPoolExecutor(num_cores()) as pool:
      for _ in pool.map(fill, views, wanted):
        pass  # going through the results raises what a thread raised
    if len(self) * math.prod(self.shape) <= KEEP:
      for row, view in zip(wanted, views, strict=True):
        self._kept.setdefault(row, view)
    return views

  def manifest(self) -> list[tuple[str, str, int]]:
    """Returns rows of (split, class, number of images), one per class."""
    counts = np.bincount(self.labels, minlength=self.num_classes)
    names = self.classes or [str(i) for i in range(self.num_classes)]
    return [
      (self.split, name, int(count))
      for name, count in zip(names, counts, strict=True)
    ]

  def subset(self, size: int, seed: int) -> "Source":
    """Draws images, with the classes' shares kept.

    Args:
      size: the number of images; 0 for all.
      seed: seeds the draw.

    Raises:
      ValueError: there are not as many, or too few for the shares.
    """
    if size in (0, len(self)):
      return self
    most = len(self) - self.num_classes
    if not self.num_classes <= size <= most:
      raise ValueError(
        f"train_size must be between {self.num_classes} (one image of each"
        f" class) and {most}, or {len(self)} or 0 for all; got {size}"
      )
    if np.bincount(self.labels).min() < 2:
      raise ValueError(
        f"train_size={size} draws from each class, and one has a single image;"
        " take them all: train_size=0"
      )
    rows, _ = stratified(self.labels, size, len(self) - size, seed)
    return self.take(rows)

  def some(self, count: int) -> Integer[np.ndarray, " n"]:
    """Returns the positions of a few images for a quick measurement.

    They are the first; or evenly spaced ones where images are grouped by class,
    as in folders, whose first images would be of few classes.

    Args:
      count: the number of images; 0, or more than there are: all.
    """
    rows = np.arange(len(self))
    if not 0 < count < len(rows):
      return rows
    changes = np.count_nonzero(np.diff(self.labels))
    if changes >= self.num_classes:
      return rows[:count]
    return rows[:count] * len(rows) // count

  def take(self, rows: np.ndarray) -> "Source":
    """Returns the source of the images at these positions."""
    return dataclasses.replace(
      self,
      images=self.images[rows],
      labels=self.labels[rows],
      indices=self.indices[rows],
    )


def num_cores() -> int:
  """Returns the number of cores that this process may run on."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def stacked(
  read: Callable[[int], np.ndarray], numbers: Integer[np.ndarray, " n"]
) -> Integer[np.ndarray, "n h w c"]:
  """Reads images of one size by all cores, and stacks them.

  Args:
    read: an image's number -> uint8 [h, w, c].
    numbers: which are wanted, in this order.
  """
  with concurrent.futures.ThreadPoolExecutor(num_cores()) as pool:
    return np.stack(list(pool.map(read, numbers.tolist())))


def stratified(
  labels: Integer[np.ndarray, " n"], first: int, second: int, seed: int
) -> tuple[Integer[np.ndarray, " a"], Integer[np.ndarray, " b"]]:
  """Draws disjoint positions, each part with the classes' shares.

  Args:
    labels: the class of each position.
    first: the number of positions in the first part.
    second: the number in the second.
    seed: seeds the draw.

  Returns:
    The two parts, int64, each in ascending order.
  """
  extras.need("sklearn")
  from sklearn import model_selection

  a, b = model_selection.train_test_split(
    np.arange(len(labels)),
    train_size=first,
    test_size=second,
    stratify=labels,
    random_state=seed,
  )
  return np.sort(a), np.sort(b)
