"""The forms of CIFAR, each read in the order of the original files.

The python and the binary version number the images alike: batches one to five,
one after another. Hugging Face's CIFAR-10 has the batches in the order that
the python archive has them in, 4, 3, 2, 5, 1; here they are put back.
"""

import dataclasses
import functools
import io
import pathlib
import posixpath
import re
import tarfile
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from roli_jax.data import decode, listing, source, walk
from roli_jax.files import extras, pickles
from roli_jax.types import Integer

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE  # bytes of an image


@dataclasses.dataclass(frozen=True)
class Kind:
  """How the files of one CIFAR are called.

  Attributes:
    python: its python archive, without .tar.gz.
    folder: the directory in it.
    train: the files of training images in it, in order.
    test: the file of test images.
    labels: the key of the labels.
    column: the column of the labels in Hugging Face's parquet.
    binary: its binary archive, without .tar.gz.
    binary_folder: the directory in that, whose files end with .bin.
    bytes: the bytes of labels before each image there, the last its class.
  """

  python: str
  folder: str
  train: tuple[str, ...]
  test: str
  labels: str
  column: str
  binary: str
  binary_folder: str
  bytes: int


@dataclasses.dataclass(frozen=True)
class Part:
  """The training or the test images, numbered as in the original files.

  Attributes:
    labels: whole numbers [n], by the images' numbers.
    images: numbers [k] -> uint8 [k, 32, 32, 3].
    notes: what a user should know, a line each.
  """

  labels: np.ndarray
  images: Callable[[np.ndarray], np.ndarray]
  notes: tuple[str, ...] = ()


# "train" or "test" -> its images
Read = Callable[[str], Part]

KINDS = {
  "cifar10": Kind(
    python="cifar-10-python",
    folder="cifar-10-batches-py",
    train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test="test_batch",
    labels="labels",
    column="label",
    binary="cifar-10-binary",
    binary_folder="cifar-10-batches-bin",
    bytes=1,
  ),
  "cifar100": Kind(
    python="cifar-100-python",
    folder="cifar-100-python",
    train=("train",),
    test="test",
    labels="fine_labels",
    column="fine_label",
    binary="cifar-100-binary",
    binary_folder="cifar-100-binary",
    bytes=2,
  ),
}

# In the order of labels, which is the alphabet's.
CLASSES: dict[str, tuple[str, ...]] = {
  "cifar10": (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse",
    "ship", "truck",
  ),
  "cifar100": (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee",
    "beetle", "bicycle", "bottle", "bowl", "boy", "bridge", "bus",
    "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair",
    "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab",
    "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard",
    "lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man",
    "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree",
    "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck",
    "pine_tree", "plain", "plate", "poppy", "porcupine", "possum", "rabbit",
    "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark",
    "shrew", "skunk", "skyscraper", "snail", "snake", "spider", "squirrel",
    "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone",
    "television", "tiger", "tractor", "train", "trout", "tulip", "turtle",
    "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
  ),
}  # fmt: skip

# The first labels of CIFAR-10's batches, which tell them in parquet.
_STARTS = (
  (6, 9, 9, 4, 1, 1, 2, 7, 8, 3),
  (1, 6, 6, 8, 8, 3, 4, 6, 0, 6),
  (8, 5, 0, 6, 9, 2, 8, 3, 6, 2),
  (0, 6, 0, 2, 7, 2, 1, 2, 4, 1),
  (1, 8, 5, 1, 5, 7, 4, 3, 8, 2),
)


def pickled(name: str, place: pathlib.Path) -> Read | None:
  """Opens the python version, of which nothing is executed.

  Args:
    name: "cifar10" or "cifar100".
    place: the directory that holds `cifar-10-batches-py` or the archive, or
      that is the former.

  Returns:
    What reads it; None where it is not.
  """
  kind = KINDS[name]
  first, archive = kind.train[0], f"{kind.python}.tar.gz"
  holder = _holder(place, kind.folder, archive, first)

  def read(part: str) -> Part:
    files = kind.train if part == "train" else (kind.test,)
    batches = [
      _batch(content, f"{holder}: {file}", kind.labels)
      for file, content in _contents(holder, kind.folder, files).items()
    ]
    return _part(name, *map(np.concatenate, zip(*batches, strict=True)))

  return read if holder else None


def binary(name: str, place: pathlib.Path) -> Read | None:
  """Opens the binary version; as `pickled`."""
  kind = KINDS[name]
  train = [f"{file}.bin" for file in kind.train]
  archive = f"{kind.binary}.tar.gz"
  holder = _holder(place, kind.binary_folder, archive, train[0])

  def read(part: str) -> Part:
    files = train if part == "train" else (f"{kind.test}.bin",)
    found = _contents(holder, kind.binary_folder, files)
    content = b"".join(found.values())
    if len(content) % (kind.bytes + _PIXELS):
      raise ValueError(f"{holder}: {files[-1]} and its like are truncated")
    rows = np.frombuffer(content, np.uint8).reshape(-1, kind.bytes + _PIXELS)
    return _part(name, rows[:, kind.bytes - 1], rows[:, kind.bytes :])

  return read if holder else None


def parquet(name: str, place: pathlib.Path) -> Read | None:
  """Opens parquet files as Hugging Face serves them; as `pickled`.

  They are `train-*.parquet` and `test-*.parquet`, there or in directories
  below, as the hub's `plain_text` and `cifar100`.
  """
  files = {
    part: sorted([*place.glob(f"{part}*.parquet"),
                  *place.glob(f"*/{part}*.parquet")])
    for part in ("train", "test")
  }  # fmt: skip

  def read(part: str) -> Part:
    extras.need("pyarrow")
    from pyarrow import parquet

    try:
      tables = [parquet.read_table(file).to_pydict() for file in files[part]]
      images = [cell["bytes"] for table in tables for cell in table["img"]]
      column = KINDS[name].column
      labels = np.array([x for table in tables for x in table[column]])
    except Exception as error:  # of any type, by what the bytes lead to
      raise ValueError(
        f"{place} has no parquet of {name}, with columns img and"
        f" {KINDS[name].column}: {type(error).__name__}: {error!s:.80}"
      ) from error
    rows = _batch_order(labels) if name == "cifar10" else np.arange(len(labels))
    return decoded(name, labels[rows], [images[row] for row in rows])

  return read if all(files.values()) else None


def folders(name: str, place: pathlib.Path) -> Read | None:
  """Opens `{train,test}/CLASS/NUMBER.png`; as `pickled`.

  A name's digits are the image's number, if of each part they are all of 0 to
  n - 1; else images are numbered in the order of classes and names.
  """
  trees, _ = walk.named(place) if place.is_dir() else ({}, [])

  def read(part: str) -> Part:
    tree = listing.single(place, trees)[part]
    names = walk.walk(place / tree).images
    classes = [n.split("/")[0] for n in names]
    digits = [re.findall(r"\d+", pathlib.PurePath(n).stem) for n in names]
    numbers = [int(found[0]) for found in digits if len(found) == 1]
    notes = []
    if sorted(numbers) != list(range(len(names))):
      numbers = list(range(len(names)))
      notes.append(
        f"names in {place / tree} don't number the images of {name}, so that"
        " their split is not the one of other forms"
      )
    lossy = [n for n in names if n.lower().endswith((".jpg", ".jpeg"))]
    if lossy:
      notes.append(
        f"{len(lossy)} images in {place / tree} are JPEGs, whose pixels are"
        f" not those of {name}: no number is one of {name}"
      )
    rows = np.argsort(numbers)
    labels = np.array(_labels(name, classes))
    files = [place / tree / names[row] for row in rows]
    return decoded(name, labels[rows], files, tuple(notes))

  return read if trees.keys() >= {"train", "test"} else None


def _labels(name: str, classes: Sequence[str]) -> list[int]:
  """Returns labels by the names of classes, which may be numbers or others."""
  known = {*classes}
  if known <= {*CLASSES[name]}:
    return [CLASSES[name].index(x) for x in classes]
  if all(x.isdecimal() for x in known):
    return [int(x) for x in classes]
  if len(known) != len(CLASSES[name]):
    raise ValueError(
      f"{name} has {len(CLASSES[name])} classes, here are {len(known)}:"
      f" {walk.some(sorted(known))}"
    )
  return [sorted(known).index(x) for x in classes]


FORMS = (pickled, binary, parquet, folders)


def _holder(
  place: pathlib.Path, folder: str, archive: str, first: str
) -> pathlib.Path | None:
  """Returns the directory or the archive that files are in, if one is there."""
  for directory in (place / folder, place):
    if (directory / first).is_file():
      return directory
  return place / archive if (place / archive).is_file() else None


def _contents(
  holder: pathlib.Path | None, folder: str, files: Sequence[str]
) -> dict[str, bytes]:
  """Reads files of a directory, or of an archive, which is gone through once.

  Returns:
    Contents by name, in the order asked for.
  """
  assert holder is not None, "its reader is asked for only where it is"
  found: dict[str, bytes] = {}
  try:
    if holder.is_dir():
      present = [name for name in files if (holder / name).is_file()]
      found = {name: (holder / name).read_bytes() for name in present}
    else:
      with tarfile.open(holder, "r|*") as archive:
        for member in archive:
          outer, name = posixpath.split(posixpath.normpath(member.name))
          content = archive.extractfile(member)
          if content and outer == folder and name in files:
            found[name] = content.read()
          if len(found) == len(files):
            break
  except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
    raise ValueError(
      f"{holder} can't be read: {error}; remove it, and --mode=prepare fetches"
      " it anew"
    ) from error
  lacking = [name for name in files if name not in found]
  if lacking:
    raise ValueError(f"{holder} lacks {', '.join(lacking)}")
  return {name: found[name] for name in files}


def _batch(
  content: bytes, what: str, key: str
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the labels and pixels of a pickled batch."""

  def storage(*_: object) -> np.ndarray:
    raise pickles.Refused("holds tensors of PyTorch")

  try:
    batch = {
      name.decode() if isinstance(name, bytes) else name: value
      for name, value in pickles.run(content, storage).items()
    }
    return np.asarray(batch[key]), np.asarray(batch["data"])
  except pickles.Refused as error:
    reason = str(error).partition(";")[0]
    raise ValueError(f"{what} is no batch of CIFAR: it {reason}") from error
  except Exception as error:  # bytes at random can raise anything
    raise ValueError(
      f"{what} is truncated or no batch of CIFAR"
      f" ({type(error).__name__}: {error!s:.80})"
    ) from error


def _part(name: str, labels: np.ndarray, pixels: np.ndarray) -> Part:
  """Makes a part of bytes: all of red, then of green, then of blue."""
  if pixels.dtype != np.uint8 or pixels.shape != (len(labels), _PIXELS):
    raise ValueError(
      f"{name} has images of {_PIXELS} bytes, here are {pixels.dtype}"
      f" {pixels.shape} and {len(labels)} labels"
    )
  _check(name, labels)

  def images(numbers: np.ndarray) -> np.ndarray:
    planes = pixels[numbers].reshape(-1, 3, _SIDE, _SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1))

  return Part(labels, images)


def decoded(
  name: str,
  labels: np.ndarray,
  files: Sequence[pathlib.Path | bytes],
  notes: tuple[str, ...] = (),
) -> Part:
  """Makes a part of encoded images, which are decoded when they are asked for.

  Args:
    name: "cifar10" or "cifar100".
    labels: by the images' numbers.
    files: likewise, paths or contents.
    notes: of the part.

  Raises:
    ValueError: labels of other classes; later, an image that can't be read.
  """
  extras.need("PIL")
  _check(name, labels)

  def image(number: int) -> Integer[np.ndarray, "32 32 3"]:
    file = files[number]
    try:
      picture = decode.decode(
        io.BytesIO(file) if isinstance(file, bytes) else file
      )
      return np.asarray(picture).reshape(_SIDE, _SIDE, 3)
    except Exception as error:  # decoders raise whatever bytes lead them to
      raise ValueError(
        f"image {number} of {name} can't be read as 32 x 32 pixels: {error}"
      ) from error

  return Part(labels, functools.partial(source.stacked, image), notes)


def _check(name: str, labels: np.ndarray) -> None:
  """Raises a ValueError for labels that are not of all of these classes."""
  most = len(CLASSES[name])
  is_whole = np.issubdtype(labels.dtype, np.integer) and len(labels)
  if not is_whole or labels.min() < 0 or labels.max() >= most:
    raise ValueError(f"{name} has labels 0 to {most - 1}, here are others")


def _batch_order(labels: Integer[np.ndarray, " n"]) -> np.ndarray:
  """Returns the rows of CIFAR-10's training images by number.

  Rows whose fifths don't begin as the batches do are taken as they are.
  """
  rows = np.arange(len(labels))
  if len(labels) % len(_STARTS):
    return rows
  fifths = np.split(labels, len(_STARTS))
  starts = [tuple(fifth[: len(_STARTS[0])].tolist()) for fifth in fifths]
  if sorted(starts) != sorted(_STARTS):
    return rows
  batches = np.split(rows, len(_STARTS))
  return np.concatenate([batches[starts.index(start)] for start in _STARTS])
