"""CIFAR through TensorFlow Datasets, read without TensorFlow."""

import concurrent.futures
import functools
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from roli_jax.data import source
from roli_jax.files import extras
from roli_jax.types import Integer

_TRAINING = 50_000  # images in CIFAR's training split; test images count on

_PREPARE = """\
{reason}
  pip install tensorflow-datasets tensorflow-cpu   # TensorFlow prepares only
  python -c "import tensorflow_datasets as t; \
t.builder('{name}', data_dir='{where}', file_format='array_record')\
.download_and_prepare()"
prepares {name}; --config.data.root=DIR or TFDS_DATA_DIR, if it is elsewhere."""


def cifar(name: str, split: str, root: str = "") -> source.Source:
  """Reads CIFAR-10 or CIFAR-100: 45,000 train, 5,000 val, 10,000 test images.

  Train and val are the first nine tenths and the last of the training split in
  the order of TFDS, as in the RoLI reference; see `order`. An image's index is
  its number in the original files. The split is held in memory, uint8.

  Args:
    name: "cifar10" or "cifar100".
    split: `train`, `val` or `test`.
    root: TFDS's directory of data; "" for $TFDS_DATA_DIR, or TFDS's own.

  Raises:
    ValueError: it is not prepared (the message has the command that prepares
      it), or its records are not the whole of a CIFAR.
  """
  part = "test" if split == "test" else "train"
  records, label = _records(name, part, root)
  numbers = _numbers([record["id"] for record in records], part, name)
  positions = {number: i for i, number in enumerate(numbers)}
  ordered = order(len(records), part)
  most = len(ordered) * 9 // 10
  numbers = {"train": ordered[:most], "val": ordered[most:]}.get(split, ordered)
  chosen = [records[positions[number]] for number in numbers]
  with concurrent.futures.ThreadPoolExecutor(source.num_cores()) as pool:
    images = np.stack(list(pool.map(_decode, chosen)))
  offset = _TRAINING if split == "test" else 0
  return source.Source(
    images=images,
    labels=np.array([record["label"] for record in chosen], np.int32),
    indices=np.array(numbers, np.uint32) + np.uint32(offset),
    num_classes=label.num_classes,
    split=split,
    classes=tuple(label.names),
  )


@functools.cache
def order(count: int, salt: str) -> list[int]:
  """Returns the numbers below `count` in the order of TFDS's records.

  By the MD5 of the salt and the number in decimals, as a whole number of 128
  bits.

  Args:
    count: the number of records.
    salt: the name of the split, as TFDS has it.
  """

  def place(number: int) -> bytes:
    return hashlib.md5(f"{salt}{number}".encode()).digest()

  return sorted(range(count), key=place)


def _records(
  name: str, part: str, root: str
) -> tuple[list[dict[str, Any]], Any]:
  """Reads features by record, images still encoded; and TFDS's `ClassLabel`."""
  where = root or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  say = functools.partial(_PREPARE.format, name=name, where=where)
  try:
    extras.need("tensorflow_datasets")
  except ModuleNotFoundError as error:
    raise ValueError(say(reason=error)) from error
  import tensorflow_datasets as tfds

  directory = os.path.expanduser(where)
  decoders = {"image": tfds.decode.SkipDecoding()}
  try:
    builder = tfds.builder(name, data_dir=directory)
    data = builder.as_data_source(part, decoders=decoders)
  except (AssertionError, NotImplementedError, ValueError) as error:
    found = _format(pathlib.Path(directory, name))
    reason = f"{name} is not prepared as array_record in {where}" + (
      f", but as {found}, which TensorFlow alone can read: move it away."
      if found not in ("", "array_record")
      else "."
    )
    raise ValueError(say(reason=reason)) from error
  records = [data[i] for i in range(len(data))]
  return records, builder.info.features["label"]


def _format(directory: pathlib.Path) -> str:
  """Returns the format of the files that TFDS prepared; "" without any."""
  for file in sorted(directory.glob("*/dataset_info.json")):
    return json.loads(file.read_text()).get("fileFormat", "tfrecord")
  return ""


def _numbers(ids: Iterable[Any], part: str, name: str) -> list[int]:
  """Parses ids such as b"train_16399"; raises a ValueError if any lacks."""
  texts = [bytes(x).decode().removeprefix(f"{part}_") for x in ids]
  numbers = [int(text) for text in texts if text.isdecimal()]
  if sorted(numbers) != list(range(len(texts))):
    raise ValueError(
      f"the {len(texts)} records of {name}'s {part} split are not those of"
      f" {part}_0 to {part}_{len(texts) - 1}; prepare it again"
    )
  return numbers


def _decode(record: Mapping[str, Any]) -> Integer[np.ndarray, "h w 3"]:
  extras.need("PIL")
  from PIL import Image

  with Image.open(io.BytesIO(record["image"])) as image:
    return np.asarray(image.convert("RGB"))
