"""Made-up images of CIFAR, in all the forms in which the real ones come."""

import io
import pathlib
import struct
import tarfile

import numpy as np
from PIL import Image

from roli_jax.data import cifar_files

COUNTS = {"train": 60, "test": 20}


def made(name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Noise [n, 32, 32, 3] and labels [n], by part.

  Each fifth of CIFAR-10's training labels begins as the batch does.
  """
  rng, found = np.random.default_rng(int(name[5:])), {}
  for part, count in COUNTS.items():
    images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    labels = rng.integers(0, int(name[5:]), count)
    if name == "cifar10" and part == "train":
      labels.reshape(5, -1)[:, :10] = cifar_files._STARTS
    found[part] = images, labels
  return found


def batches(name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Images and labels by the names of the python version's files."""
  kind, parts = cifar_files.KINDS[name], made(name)
  split = [np.split(array, len(kind.train)) for array in parts["train"]]
  return dict(zip(kind.train, zip(*split, strict=True), strict=True)) | {
    kind.test: parts["test"]
  }


def planes(images: np.ndarray) -> np.ndarray:
  return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def python(root: pathlib.Path, name: str) -> None:
  """The python version, unpacked."""
  kind = cifar_files.KINDS[name]
  folder = root / kind.folder
  folder.mkdir(parents=True)
  for file, (images, labels) in batches(name).items():
    batch = {"batch_label": file, kind.labels: labels, "data": planes(images)}
    (folder / file).write_bytes(pickled(batch))


def pickled(batch: dict) -> bytes:
  """A batch as Python 2's cPickle wrote it, protocol 2: text is bytes."""

  def value(x: object) -> bytes:
    if isinstance(x, str):
      return b"U" + bytes([len(x)]) + x.encode()
    if x.ndim == 1:
      return b"](" + b"".join(b"K" + bytes([i]) for i in x.tolist()) + b"e"
    shape = b"(" + b"".join(b"J" + struct.pack("<i", n) for n in x.shape) + b"t"
    text = b"T" + struct.pack("<i", x.nbytes) + x.tobytes()
    return (
      b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
      + b"(K\x01" + shape
      + b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
      + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
      + b"\x89" + text + b"tb"
    )  # fmt: skip

  items = b"".join(value(key) + value(batch[key]) for key in batch)
  return b"\x80\x02}(" + items + b"u."


def binary(root: pathlib.Path, name: str) -> None:
  """The binary version, unpacked."""
  kind = cifar_files.KINDS[name]
  folder = root / kind.binary_folder
  folder.mkdir(parents=True)
  for file, (images, labels) in batches(name).items():
    columns = [labels[:, None]] if name == "cifar10" else [
      labels[:, None] % 20, labels[:, None]
    ]  # fmt: skip
    rows = np.concatenate([*columns, planes(images)], 1).astype(np.uint8)
    (folder / f"{file}.bin").write_bytes(rows.tobytes())


def archive(root: pathlib.Path, name: str, form) -> pathlib.Path:
  """The archive of a version, whose files come in no particular order."""
  kind = cifar_files.KINDS[name]
  form(root, name)
  (folder,) = [path for path in root.iterdir() if path.is_dir()]
  stem = kind.python if form is python else kind.binary
  file = root / f"{stem}.tar.gz"
  with tarfile.open(file, "w:gz") as out:
    for path in sorted(folder.iterdir(), key=lambda p: p.name[::-1]):
      out.add(path, f"{folder.name}/{path.name}")
  for path in folder.iterdir():
    path.unlink()
  folder.rmdir()
  return file


def png(image: np.ndarray) -> bytes:
  out = io.BytesIO()
  Image.fromarray(image).save(out, "png")
  return out.getvalue()


def parquet(root: pathlib.Path, name: str) -> None:
  """Hugging Face's files: CIFAR-10's batches lie as in the archive."""
  import pyarrow
  from pyarrow import parquet

  folder = root / "plain_text"
  folder.mkdir(parents=True)
  order = [3, 2, 1, 4, 0] if name == "cifar10" else [0]
  for part, (images, labels) in made(name).items():
    rows = np.arange(len(labels))
    if part == "train":
      fifths = np.split(rows, len(order))
      rows = np.concatenate([fifths[i] for i in order])
    cells = [{"bytes": png(images[row]), "path": None} for row in rows]
    columns = {"img": cells, cifar_files.KINDS[name].column: labels[rows]}
    table = pyarrow.table(columns)
    parquet.write_table(table, folder / f"{part}-00000-of-00001.parquet")


def folders(root: pathlib.Path, name: str) -> None:
  """Directories of classes, with images' numbers for names."""
  for part, (images, labels) in made(name).items():
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
      folder = root / part / cifar_files.CLASSES[name][label]
      folder.mkdir(parents=True, exist_ok=True)
      (folder / f"{number:05d}.png").write_bytes(png(image))


def tfds(
  root: pathlib.Path,
  name: str,
  parts: dict[str, tuple[np.ndarray, np.ndarray]] | None = None,
  first: int = 0,
) -> None:
  """A look-alike in TFDS's own files, with the true features.

  Args:
    root: TFDS's directory of data.
    name: "cifar10" or "cifar100".
    parts: images and labels by part; None: `made`.
    first: the number of the first image.
  """
  import tensorflow_datasets as tfds

  parts = parts or made(name)
  features = {
    "id": tfds.features.Text(),
    "image": tfds.features.Image(shape=(32, 32, 3)),
    "label": tfds.features.ClassLabel(num_classes=int(name[5:])),
  }
  if name == "cifar100":
    features["coarse_label"] = tfds.features.ClassLabel(num_classes=20)

  with tfds.core.registered.skip_registration():

    class Cifar(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version("3.0.2")

      def _info(self):
        return tfds.core.DatasetInfo(
          builder=self, features=tfds.features.FeaturesDict(features)
        )

      def _split_generators(self, dl_manager):
        return {part: self._generate_examples(part) for part in parts}

      def _generate_examples(self, part):
        for i, (image, label) in enumerate(zip(*parts[part], strict=True)):
          example = {
            "id": f"{part}_{first + i:05d}",
            "image": Image.fromarray(image),
            "label": int(label),
          }
          if name == "cifar100":
            example["coarse_label"] = i % 20
          yield first + i, example

  Cifar.name = name
  Cifar(data_dir=root, file_format="array_record").download_and_prepare()
