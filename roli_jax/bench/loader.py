"""How fast images come: from files beside plain PIL, from memory."""

import functools
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np

from roli_jax import data
from roli_jax.bench.timing import Row, row
from roli_jax.data import transforms
from roli_jax.files import extras

# Reads images; returns how many, and the seconds that they took.
Call = Callable[[], tuple[int, float]]

_BATCH = 32
_WARM = 10  # batches read before the clock starts: buffers are empty then
_TIMED = 16  # batches


def loader(config: Mapping[str, Any]) -> Iterator[Row]:
  """Reads photographs of 500 x 400, cropped to 224, and CIFAR from memory.

  Args:
    config: `loader_runs`, the number of runs whose median is taken, default 3;
      `loader_images`, the number of files that are written, default 400.
  """
  runs = config.get("loader_runs", 3)
  with tempfile.TemporaryDirectory() as directory:
    root = pathlib.Path(directory)
    # What is remembered of these files goes with them.
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=directory):
      _write(root, config.get("loader_images", 400))
      source = data.build({"name": "folder", "root": directory}, "train")
    yield from _measured(_calls(source), runs)
  cifar = functools.partial(_stream, _cifar(), count=600, batch_size=64)
  yield from _measured({"CIFAR from memory": cifar}, runs)


def _calls(source: data.Source) -> dict[str, Call]:
  """The ways to read the files, by name."""
  plain = functools.partial(_plain, source)
  stream = functools.partial(_stream, source)
  return {
    "PIL decode alone": functools.partial(plain, crop=False),
    "PIL decode, resize, crop": functools.partial(plain, crop=True),
    "0 workers, 1 thread": functools.partial(stream, num_threads=1),
    "0 workers, a thread per core": stream,
    "1 worker": functools.partial(stream, num_workers=1),
    "2 workers": functools.partial(stream, num_workers=2),
  }


def _measured(calls: Mapping[str, Call], runs: int) -> Iterator[Row]:
  """Medians of the calls' rates, the calls taking turns."""
  rates: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(runs):
    for name, call in calls.items():
      count, seconds = call()
      rates[name].append(count / seconds)
  for name, values in rates.items():
    rate = statistics.median(values)
    yield row("loader", name, 1 / rate, images_per_s=rate)


def _plain(source: data.Source, crop: bool) -> tuple[int, float]:
  """PIL in one thread, on files in the order in which they are listed."""
  from PIL import Image

  rng = np.random.default_rng(0)
  chain = source.train_transforms if crop else ()
  started = time.perf_counter()
  for path in source.images:
    with Image.open(path) as image:
      transforms.apply(chain, rng, image.convert("RGB"))
  return len(source), time.perf_counter() - started


def _stream(
  source: data.Source,
  count: int = _TIMED,
  batch_size: int = _BATCH,
  **options: int,
) -> tuple[int, float]:
  """So many batches of our pipeline, once it runs."""
  batches = data.train_batches(source, batch_size, seed=0, **options)
  for _ in range(_WARM):
    next(batches)
  started = time.perf_counter()
  for _ in range(count):
    next(batches)
  seconds = time.perf_counter() - started
  batches.close()  # type: ignore[attr-defined]
  return count * batch_size, seconds


def _write(root: pathlib.Path, count: int) -> None:
  """Writes JPEGs of about 68 kB: blurred noise, and a little that is not."""
  extras.need("PIL")
  from PIL import Image

  rng = np.random.default_rng(0)
  for i in range(count):
    coarse = rng.integers(0, 256, (25, 20, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((500, 400), Image.Resampling.BICUBIC)
    pixels = np.asarray(image) + rng.normal(0, 5, (400, 500, 1))
    # The held out need a few; all that is measured is training.
    split = {0: "val", 1: "test"}.get(i, "train")
    file = root / split / "ab"[i % 2] / f"{i}.jpg"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=90)


def _cifar() -> data.Source:
  """45,000 images of 32 x 32 noise."""
  rng = np.random.default_rng(0)
  return data.Source(
    images=rng.integers(0, 256, (45_000, 32, 32, 3), dtype=np.uint8),
    labels=rng.integers(0, 10, 45_000, dtype=np.int32),
    indices=np.arange(45_000, dtype=np.uint32),
    num_classes=10,
  )
