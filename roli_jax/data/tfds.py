"""CIFAR through TensorFlow Datasets, read without TensorFlow."""

import numpy as np

from roli_jax.data import source

_TRAIN = 45_000  # of the 50,000; the rest, in record order, is validation

_PREPARE = """\
{reason}
  pip install tensorflow-datasets tensorflow-cpu   # TensorFlow prepares only
  python -c "import tensorflow_datasets as t; \
t.builder('{name}', file_format='array_record').download_and_prepare()"
prepares {name}, in ~/tensorflow_datasets or in TFDS_DATA_DIR."""


def cifar(name: str, split: str) -> source.Source:
  """CIFAR-10 or CIFAR-100: 45,000 train, 5,000 val, 10,000 test images.

  Train and val are the first and the last records of TFDS's training split, in
  its order, as in the RoLI reference. The whole set is held in memory, uint8.

  Raises:
    ValueError: where it is not prepared, with the command that prepares it.
  """
  try:
    import tensorflow_datasets as tfds
  except ModuleNotFoundError as error:
    reason = "tensorflow_datasets is not installed."
    raise ValueError(_PREPARE.format(name=name, reason=reason)) from error
  try:
    builder = tfds.builder(name)
    records = builder.as_data_source("test" if split == "test" else "train")
  except (AssertionError, NotImplementedError, ValueError) as error:
    reason = f"{name} is not prepared as array_record."
    raise ValueError(_PREPARE.format(name=name, reason=reason)) from error
  rows = {
    "train": range(min(_TRAIN, len(records))),
    "val": range(_TRAIN, len(records)),
    "test": range(len(records)),
  }[split]
  chosen = [records[i] for i in rows]
  return source.Source(
    images=np.stack([record["image"] for record in chosen]),
    labels=np.array([record["label"] for record in chosen], np.int32),
    # Test images count on from the training split's.
    indices=np.array(rows, np.uint32) + (50_000 if split == "test" else 0),
    num_classes=builder.info.features["label"].num_classes,
  )
