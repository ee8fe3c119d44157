"""From a source to batches: shuffled, sharded by process, resumable by step."""

from collections.abc import Iterator
from typing import Any

import jax

from roli_jax.data.source import Source


def train_batches(
  source: Source, batch_size: int, seed: int, start: int = 0
) -> Iterator[dict[str, Any]]:
  """Endless batches of this process's images, from a step on.

  Every epoch is a permutation of its own; a batch may span two epochs, so none
  is short and no image is left out. Batch k is a function of (source,
  batch_size, seed, k): the step is all that a checkpoint has to know, and the
  processes' batches k together are the batch k of a single process.

  Args:
    source: the training images.
    batch_size: over all processes, which must divide it.
    seed: of the order.
    start: the first batch's number.

  Yields:
    `{"image": uint8 [b, h, w, c], "label": int32 [b], "index": uint32 [b]}`.
  """
  import grain

  process, processes = jax.process_index(), jax.process_count()
  batches = (
    grain.MapDataset.source(source)  # type: ignore[arg-type]
    .shuffle(seed=seed)
    .repeat(None)[process::processes]
    .batch(batch_size // processes)[start:]
  )
  options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
  return iter(batches.to_iter_dataset(options))
