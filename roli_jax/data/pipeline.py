"""From a source to batches: shuffled, sharded by process, resumable by step."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np
from absl import flags

from roli_jax.data.source import Source, num_cores
from roli_jax.files import extras
from roli_jax.types import Integer

if TYPE_CHECKING:  # since it comes with an extra
  import grain

Batch = dict[str, np.ndarray]


def train_batches(
  source: Source,
  batch_size: int,
  seed: int,
  start: int = 0,
  num_workers: int = 0,
  *,
  num_threads: int = 0,
) -> Iterator[Batch]:
  """Yields endless batches of this process's images, from a step on.

  Every epoch is a permutation of its own; a batch may span two epochs, so none
  is short and no image is left out. Batch k, augmentations included, is a
  function of (source, batch_size, seed, k): the step is all that a checkpoint
  has to know, workers change nothing, and the processes' batches k together
  are the batch k of a single process.

  Args:
    source: the training images.
    batch_size: images of all processes together, whose number divides it.
    seed: seeds the order and the augmentations.
    start: the first batch's number, from 0.
    num_workers: processes that decode and augment; 0: threads of this one.
    num_threads: threads of each of them; 0: as many as cores where there are
      no workers, else 1.

  Returns:
    An iterator of `{"image": uint8 [b, h, w, c], "label": int32 [b], "index":
    uint32 [b]}`; `close()` ends its workers, as does letting go of it.

  Raises:
    ValueError: no images, or a number of workers that can't be; later, a file
      that can't be read any more.
    RuntimeError: later, if a worker dies.
  """
  if not len(source):
    raise ValueError("there are no training images")
  if num_workers < 0:
    raise ValueError(f"data.num_workers must be >= 0, got {num_workers}")
  extras.need("grain")
  import grain

  process, processes = jax.process_index(), jax.process_count()
  rows = (
    grain.MapDataset.source(range(len(source))).shuffle(seed=seed).repeat(None)
  )
  if not source.is_plain:
    # Before the slice by process, so that an image's chance is its place in
    # the stream, whoever decodes it.
    rows = rows.random_map(_with_chance, seed=seed + 1)
  # Positions make a batch, not images: a batch is looked up, or written, once.
  rows = rows[process::processes].batch(batch_size // processes)[start:]
  if source.is_plain:  # there is nothing for workers to do
    batches = rows.map(functools.partial(_plain, source))
    return _read(batches, 0, num_threads or 2)
  # A copy, since the source may keep pixels, which workers don't need.
  augment = functools.partial(_augmented, dataclasses.replace(source))
  return _read(rows.map(augment), num_workers, num_threads)


def _with_chance(row: int, rng: np.random.Generator) -> np.ndarray:
  """Returns a position and its augmentation's seed, int64 [2]."""
  return np.array([row, rng.integers(2**62)])


def _plain(source: Source, rows: Integer[np.ndarray, " b"]) -> Batch:
  """Takes the images at these positions as they are."""
  return _batch(source, rows, source.images[rows])


def _augmented(source: Source, pairs: Integer[np.ndarray, "b 2"]) -> Batch:
  """Augments the images at these positions, each with its seed."""
  images = np.empty((len(pairs), *source.shape), np.uint8)
  for image, (row, chance) in zip(images, pairs.tolist(), strict=True):
    image[:] = source.train_image(row, np.random.default_rng(chance))
  return _batch(source, pairs[:, 0], images)


def _batch(source: Source, rows: np.ndarray, images: np.ndarray) -> Batch:
  return {
    "image": images,
    "label": source.labels[rows],
    "index": source.indices[rows],
  }


def _read(
  batches: "grain.MapDataset", num_workers: int, num_threads: int
) -> Iterator[Batch]:
  import grain

  threads = num_threads or (1 if num_workers else num_cores())
  options = grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=max(4, threads)
  )
  stream = batches.to_iter_dataset(options)
  if num_workers:
    if not flags.FLAGS.is_parsed():  # in a notebook; grain reads its flags
      flags.FLAGS.mark_as_parsed()
    stream = stream.mp_prefetch(
      grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2)
    )
  iterator = iter(stream)
  try:
    yield from iterator
  except ValueError as error:  # of ours, from a thread or a worker
    raise ValueError(str(error)) from error
  finally:
    iterator.close()
