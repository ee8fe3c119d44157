"""The six data sets of the Guide, as their authors' archives lay them out.

"A Guide to Robust Generalization" (Heuillet et al. 2025, arXiv 2508.14079);
splits are those of its repository, github.com/MaxHeuillet/robust_training at
4c886c1 (databases/loaders.py and data_processing.py), drawn by the same calls
of scikit-learn with the same seeds from images in the same order:

* A set without a split gives a fifth to the test (seed 42).
* A set without validation gives it 15% of what trains (seed 42).
* Of more than 1,000 test images 1,000 are drawn (seed 0).

All draws keep the classes' shares. Ours is the order of the training and
validation images, which is that of their names. The test images keep the order
of the draw, since the Guide says by place which one is corrupted how.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from roli_jax.data import homes, listing, walk
from roli_jax.data.source import SPLITS, Missing
from roli_jax.files import extras

# The Guide's seeds, shares, and most test images; see above.
_SEED, _TEST_SEED = 42, 0
_TEST, _VAL = 0.2, 0.15
_MOST_TESTED = 1000


@dataclasses.dataclass(frozen=True)
class Image:
  """An image file of an archive.

  Attributes:
    name: under the archive's root.
    number: its class, in the order of the original; draws go by it.
    label: what its class is called.
  """

  name: str
  number: int
  label: str | int


# By who made the split: `train`, `val` and `test`; or `trainval` and `test`;
# or `all`, where nobody did.
Parts = dict[str, list[Image]]


@dataclasses.dataclass(frozen=True)
class Layout:
  """A way in which a data set may lie.

  Attributes:
    needs: files and directories that tell it, under the root.
    read: root -> its images.
  """

  needs: tuple[str, ...]
  read: Callable[[pathlib.Path], Parts]

  def missing(self, place: pathlib.Path) -> list[str]:
    """Lists what it needs and a directory lacks."""
    return [need for need in self.needs if not (place / need).exists()]


@dataclasses.dataclass(frozen=True)
class Archive:
  """A data set as it is handed out.

  Attributes:
    home: where it comes from.
    inner: directories that it makes when it is unpacked, torchvision's first;
      the root may be one of them, or hold it.
    shown: what must lie there, for messages.
    layouts: those that it may have; the first that is there is read.
  """

  home: str
  inner: tuple[str, ...]
  shown: str
  layouts: tuple[Layout, ...]


def read(name: str, root: pathlib.Path) -> listing.Listing:
  """Lists a data set of the Guide, with its split.

  A split of the user's, as JSON or as trees, is taken as it is.

  Args:
    name: a name in ARCHIVES.
    root: where it lies.

  Raises:
    Missing: it does not lie there; the message has what must.
    ValueError: annotations that can't be read; too few images to be split by
      class.
  """
  if listing.has_splits(root):
    return listing.read(root, (".", "images"), "splits")
  archive = ARCHIVES[name]
  places = [*(root / inner for inner in archive.inner), root]
  for layout in archive.layouts:
    for place in places:
      if place.is_dir() and not layout.missing(place):
        parts = layout.read(place)
        if any(parts.values()):
          return _listing(name, place, parts)
  lacking = min((archive.layouts[0].missing(p) for p in places), key=len)
  found = f" ({lacking[0]} is missing)" if lacking else ""
  how = ""
  if name in homes.HOMES:
    given = "" if root == pathlib.Path("data", name) else str(root)
    how = f"To fetch it:\n  {homes.prepare_command(name, given)}\n"
  raise Missing(
    f"{name} is not at {root}, or not all of it{found}. {how}"
    f"There must be {archive.shown},\n"
    f"  from {archive.home}, there or in {root}/{archive.inner[0]}/; or a split"
    f" of your own,\n"
    f"  {root}/{{train,val,test}}/CLASS/NAME.jpg.\n"
    "--config.data.root=DIR if it lies elsewhere; more in docs/data.md."
  )


def _listing(name: str, base: pathlib.Path, parts: Parts) -> listing.Listing:
  try:
    splits = _split(parts)
  except ValueError as error:  # scikit-learn's
    raise ValueError(
      f"{name} at {base} can't be split by class, it has too few images of"
      f" some: {error}"
    ) from error
  entries = [
    listing.Entry(image.name, image.label, split)
    for split in SPLITS
    for image in splits[split]
  ]
  return listing.Listing(base, tuple(entries), listing.repeated(entries))


def _split(parts: Parts) -> Parts:
  if "all" in parts:
    rest, test = _divided(parts["all"], _SEED, test_size=_TEST)
    parts = {"trainval": rest, "test": test}
  if "trainval" in parts:
    train, val = _divided(parts["trainval"], _SEED, test_size=_VAL)
    parts = {"train": train, "val": val, "test": parts["test"]}
  test = parts["test"]
  if len(test) > _MOST_TESTED:
    test, _ = _divided(test, _TEST_SEED, train_size=_MOST_TESTED)
  by_name = {
    split: sorted(parts[split], key=lambda image: image.name)
    for split in ("train", "val")
  }
  return {**by_name, "test": test}


def _divided(
  images: Sequence[Image], seed: int, **size: float | int
) -> tuple[list[Image], list[Image]]:
  extras.need("sklearn")
  from sklearn import model_selection

  first, second = model_selection.train_test_split(
    images,
    stratify=[image.number for image in images],
    random_state=seed,
    **size,
  )
  return first, second


def _aircraft(root: pathlib.Path) -> Parts:
  """Reads `images_variant_{split}.txt`: lines of image and variant."""
  variants = (root / "data/variants.txt").read_text().splitlines()
  numbers = {variant.strip(): i for i, variant in enumerate(variants)}

  def images(split: str) -> Iterator[Image]:
    file = root / f"data/images_variant_{split}.txt"
    for line in filter(None, file.read_text().splitlines()):
      image, _, variant = line.strip().partition(" ")
      if variant not in numbers:
        raise ValueError(
          f"{file}: {line!r} should be an image and a variant of variants.txt"
        )
      yield Image(f"data/images/{image}.jpg", numbers[variant], variant)

  return {split: list(images(split)) for split in SPLITS}


def _flowers(root: pathlib.Path) -> Parts:
  """Reads `imagelabels.mat` and `setid.mat`; both count from 1."""
  file = root / "setid.mat"
  labels = _mat(root / "imagelabels.mat", "labels")

  def images(field: str) -> Iterator[Image]:
    for i in _mat(file, field).tolist():
      if not 1 <= i <= len(labels):
        raise ValueError(
          f"{file}: {field} has image {i}, of {len(labels)} in imagelabels.mat"
        )
      label = int(labels[i - 1])
      yield Image(f"jpg/image_{i:05d}.jpg", label, label)

  fields = zip(SPLITS, ("trnid", "valid", "tstid"), strict=True)
  return {split: list(images(field)) for split, field in fields}


def _pets(root: pathlib.Path) -> Parts:
  """Reads `{trainval,test}.txt`: lines of image, class, species, breed."""

  def images(part: str) -> Iterator[Image]:
    file = root / f"annotations/{part}.txt"
    for line in file.read_text().splitlines():
      words = line.split()
      if not words or words[0].startswith("#"):
        continue
      if len(words) != 4 or not words[1].isdecimal():
        raise ValueError(
          f"{file}: {line!r} should be an image and three numbers: class,"
          " species, breed"
        )
      label = words[0].rpartition("_")[0]  # of Abyssinian_1
      yield Image(f"images/{words[0]}.jpg", int(words[1]), label)

  return {part: list(images(part)) for part in ("trainval", "test")}


def _cars(root: pathlib.Path) -> Parts:
  """Reads the devkit: `annotations` of `fname` and `class`, from 1 up."""
  names = _mat(root / "devkit/cars_meta.mat", "class_names")
  files = {
    "trainval": ("cars_train", "devkit/cars_train_annos.mat"),
    "test": ("cars_test", "cars_test_annos_withlabels.mat"),
  }
  return {
    part: [
      _car(names, f"{folder}/{car['fname']}", car, root / file)
      for car in _records(root / file, "fname", "class")
    ]
    for part, (folder, file) in files.items()
  }


def _all_cars(root: pathlib.Path) -> Parts:
  """Reads `cars_annos.mat`: fields `relative_im_path`, `class` and `test`.

  The same images under other names and in another order, so that validation
  and test are other draws than the Guide's.
  """
  file = root / "cars_annos.mat"
  names = _mat(file, "class_names")
  parts: Parts = {"trainval": [], "test": []}
  for car in _records(file, "relative_im_path", "class", "test"):
    image = _car(names, str(car["relative_im_path"]), car, file)
    parts["test" if car["test"] else "trainval"].append(image)
  return parts


def _car(
  names: np.ndarray, path: str, car: np.void, file: pathlib.Path
) -> Image:
  """Makes an image of a record of the annotations in a file."""
  number = int(car["class"])
  if not 1 <= number <= len(names):
    raise ValueError(f"{file}: {path} has class {number}, of {len(names)}")
  return Image(path, number, str(names[number - 1]))


def _classes(root: pathlib.Path, folder: str = ".") -> Parts:
  """Reads directories of classes; Caltech's clutter is no class."""
  by_class = walk.by_folder(walk.walk(root / folder).images)
  labels = sorted(by_class.keys() - {"BACKGROUND_Google"})
  base = pathlib.PurePosixPath(folder)
  return {
    "all": [
      Image(str(base / name), number, label)
      for number, label in enumerate(labels)
      for name in by_class[label]
    ]
  }


def _in_classes(folder: str) -> tuple[Layout, Layout]:
  """Makes the layouts of directories of classes, in a folder or without it."""
  inner = functools.partial(_classes, folder=folder)
  return Layout((folder,), inner), Layout((), _classes)


def _mat(file: pathlib.Path, field: str) -> np.ndarray:
  """Reads a variable of a MATLAB file, squeezed, but of one axis at least."""
  from scipy import io

  try:
    found = io.loadmat(str(file), squeeze_me=True)
  except Exception as error:  # of any type, by what the bytes lead to
    raise ValueError(f"{file} is no MATLAB file: {error}") from error
  if field not in found:
    has = ", ".join(name for name in found if not name.startswith("__"))
    raise ValueError(f"{file} has no variable {field!r}; it has {has}")
  return np.atleast_1d(found[field])


def _records(file: pathlib.Path, *fields: str) -> np.ndarray:
  """Reads the struct array `annotations`, which must have these fields."""
  found = _mat(file, "annotations")
  has = found.dtype.names or ()
  for field in fields:
    if field not in has:
      raise ValueError(f"{file}: annotations have no field {field!r}")
  return found


_OXFORD = "www.robots.ox.ac.uk/~vgg/data"

ARCHIVES: dict[str, Archive] = {
  "aircraft": Archive(
    f"{_OXFORD}/fgvc-aircraft",
    ("fgvc-aircraft-2013b",),
    "data/{images/*.jpg,variants.txt,images_variant_{train,val,test}.txt}",
    (
      Layout(
        (
          "data/images",
          "data/variants.txt",
          *(f"data/images_variant_{split}.txt" for split in SPLITS),
        ),
        _aircraft,
      ),
    ),
  ),
  "caltech101": Archive(
    "data.caltech.edu/records/mzrjq-6wc02",
    ("caltech101", "caltech-101"),
    "101_ObjectCategories/CLASS/image_0001.jpg, or CLASS/image_0001.jpg",
    _in_classes("101_ObjectCategories"),
  ),
  "cars": Archive(
    "kaggle.com/datasets/rickyyyyyyy/torchvision-stanford-cars",
    ("stanford_cars",),
    "cars_{train,test}/*.jpg, devkit/cars_{meta,train_annos}.mat and"
    " cars_test_annos_withlabels.mat; or cars_annos.mat and car_ims/*.jpg",
    (
      Layout(
        (
          "devkit/cars_meta.mat",
          "devkit/cars_train_annos.mat",
          "cars_test_annos_withlabels.mat",
          "cars_train",
          "cars_test",
        ),
        _cars,
      ),
      Layout(("cars_annos.mat", "car_ims"), _all_cars),
    ),
  ),
  "flowers": Archive(
    f"{_OXFORD}/flowers/102",
    ("flowers-102",),
    "jpg/image_00001.jpg and so on, imagelabels.mat and setid.mat",
    (Layout(("jpg", "imagelabels.mat", "setid.mat"), _flowers),),
  ),
  "pets": Archive(
    f"{_OXFORD}/pets",
    ("oxford-iiit-pet",),
    "images/*.jpg and annotations/{trainval,test}.txt",
    (
      Layout(
        ("images", "annotations/trainval.txt", "annotations/test.txt"), _pets
      ),
    ),
  ),
  "uc_merced": Archive(
    "kaggle.com/datasets/abdulhasibuddin/uc-merced-land-use-dataset",
    ("UCMerced_LandUse",),
    "Images/CLASS/*.tif, or CLASS/*.tif",
    _in_classes("Images"),
  ),
}
