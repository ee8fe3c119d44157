"""What TensorFlow Datasets has prepared of CIFAR, read without TensorFlow."""

import functools
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from roli_jax.data import cifar_files
from roli_jax.data.cifar_files import Part, Read
from roli_jax.files import extras

_PREPARE = """\
{reason}
  pip install tensorflow-datasets tensorflow-cpu   # TensorFlow prepares only
  python -c "import tensorflow_datasets as t; \
t.builder('{name}', data_dir='{where}', file_format='array_record')\
.download_and_prepare()"
prepares {name}; --config.data.root=DIR or TFDS_DATA_DIR, if it is elsewhere."""


def cifar(name: str, place: pathlib.Path) -> Read | None:
  """Opens the array_record of CIFAR in a directory of TFDS.

  Args:
    name: "cifar10" or "cifar100".
    place: TFDS's directory of data.

  Returns:
    What reads it; None where TFDS has not prepared it.
  """
  kind = _format(place / name)
  if not kind:
    return None
  if kind != "array_record":
    reason = (
      f"{name} is prepared in {place}, but as {kind}, which TensorFlow alone"
      " can read: move it away."
    )
    raise ValueError(_say(name, place, reason))
  return functools.partial(_read, name, place)


def _read(name: str, place: pathlib.Path, part: str) -> Part:
  extras.need("tensorflow_datasets")
  import tensorflow_datasets as tfds

  decoders = {"image": tfds.decode.SkipDecoding()}
  try:
    builder = tfds.builder(name, data_dir=str(place))
    data = builder.as_data_source(part, decoders=decoders)
    records = [data[i] for i in range(len(data))]
  except Exception as error:  # of any type, by what the files lead to
    reason = f"{name} in {place} can't be read: {error!s:.80}"
    raise ValueError(_say(name, place, reason)) from error
  numbers = _numbers([record["id"] for record in records], part, name)
  ordered = [records[row] for row in np.argsort(numbers)]
  labels = np.array([record["label"] for record in ordered])
  return cifar_files.decoded(name, labels, [r["image"] for r in ordered])


def _say(name: str, place: pathlib.Path, reason: str) -> str:
  """Returns a message of how TFDS prepares CIFAR."""
  return _PREPARE.format(reason=reason, name=name, where=place)


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
