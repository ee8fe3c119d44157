"""CIFAR-10 and CIFAR-100 in any form in which they are handed out.

The python archive or what it unpacks to, the binary version, parquet as
Hugging Face serves it, folders of images, and what TFDS prepares: all of them
give the same images, indices and split. An image is known by its number in the
original files: its place in the batches, one after another.
"""

import functools
import hashlib
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from roli_jax.data import cifar_files, homes, source, tfds
from roli_jax.data.cifar_files import Read
from roli_jax.data.sizes import FACTS

_TRAINING = 50_000  # images in CIFAR's training split; test images count on


def build(name: str, split: str, root: str = "") -> source.Source:
  """Reads CIFAR-10 or CIFAR-100: 45,000 train, 5,000 val, 10,000 test images.

  Train and val are the first nine tenths and the last of the training images in
  the order of TFDS, as in the RoLI reference; see `order`. An image's index is
  its number in the original files. The split is held in memory, uint8.

  Args:
    name: "cifar10" or "cifar100".
    split: `train`, `val` or `test`.
    root: as for `find`.

  Raises:
    ValueError: it is not there, or broken.
  """
  part = "test" if split == "test" else "train"
  found = find(name, root)(part)
  ordered = order(len(found.labels), part)
  most = len(ordered) * 9 // 10
  numbers = np.array(
    {"train": ordered[:most], "val": ordered[most:]}.get(split, ordered)
  )
  expected = getattr(FACTS[name], split)
  notes = found.notes
  if len(numbers) != expected:
    notes += (f"{name} {split} has {expected} images, here are {len(numbers)}",)
  return source.Source(
    images=found.images(numbers),
    labels=found.labels[numbers].astype(np.int32),
    indices=(numbers + (_TRAINING if split == "test" else 0)).astype(np.uint32),
    num_classes=len(cifar_files.CLASSES[name]),
    split=split,
    classes=cifar_files.CLASSES[name],
    notes=notes,
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


def find(name: str, root: str = "") -> Read:
  """Finds CIFAR in the first of its forms that is there.

  Args:
    name: "cifar10" or "cifar100".
    root: a directory that holds it, or is it; "" for data/<name>, then
      $TFDS_DATA_DIR, then TFDS's own directory.

  Returns:
    What reads the images of "train" or "test".

  Raises:
    Missing: it is not there; the message has the command that fetches it.
    ValueError: it is there in a form that can't be read.
  """
  places = list(_places(name, root))
  for place in places:
    for opened in (*cifar_files.FORMS, tfds.cifar):
      read = opened(name, place)
      if read:
        return read
  kind = cifar_files.KINDS[name]
  raise source.Missing(
    f"{name} is not at {' or '.join(map(str, places))}. To fetch it:\n"
    f"  {homes.prepare_command(name, root)}\n"
    "If you have it, --config.data.root=DIR, a directory that holds\n"
    f"  {kind.python}.tar.gz or {kind.folder}/, {kind.binary}.tar.gz or"
    f" {kind.binary_folder}/,\n"
    "  Hugging Face's parquet files, {train,test}/CLASS/NUMBER.png, or TFDS's"
    " array_record;\n"
    "  more in docs/data.md."
  )


def _places(name: str, root: str) -> Iterator[pathlib.Path]:
  if root:
    yield pathlib.Path(root).expanduser()
    return
  yield pathlib.Path("data", name)
  given = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  yield pathlib.Path(given).expanduser()
