"""Which files a data set has, of which class and in which split."""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import posixpath
from collections.abc import Iterable

from roli_jax.data import picture
from roli_jax.data.source import SPLITS

# Of each class, where the user made no split; the rest trains.
_SHARES = {"test": 0.2, "val": 0.1}

LAYOUTS = """\
  ROOT/{train,val,test}/CLASS/NAME.jpg, or
  ROOT/CLASS/NAME.jpg, split 70:10:20 by us, or
  ROOT/{train,val,test}.json of {"NAME": class}, images here or in images/"""


@dataclasses.dataclass(frozen=True)
class Entry:
  """A file: its name under the root of images, its class, its split."""

  name: str
  label: str | int
  split: str


@dataclasses.dataclass(frozen=True)
class Listing:
  """What is said to be there, in the order of names.

  Attributes:
    base: where names start.
    entries: one per file and mention.
    wrong: of names that are mentioned more than once, how.
    ignored: number of files that are no images by their suffix.
    stray: number of images that lie in no class's directory.
  """

  base: pathlib.Path
  entries: tuple[Entry, ...]
  wrong: dict[str, str]
  ignored: int = 0
  stray: int = 0


def read(root: pathlib.Path, folders: Iterable[str]) -> Listing:
  """The data set at a root: from JSON splits if it has them, else from trees.

  Args:
    root: an existing directory.
    folders: under it, where the images of JSON splits may be; "." for itself.

  Raises:
    ValueError: neither is there, or JSON that is no map of names to classes.
  """
  if _has_json(root):
    return _from_json(root, folders)
  trees = _trees(root)
  if trees:
    for split in SPLITS:
      if split not in trees:
        raise ValueError(
          f"{root} has {' and '.join(trees)}, but no directory {split}/"
        )
    return _from_trees(root)
  return _from_classes(root)


def has_splits(root: pathlib.Path) -> bool:
  """Whether there are splits of the user's, as JSON or as trees."""
  return _has_json(root) or bool(_trees(root))


def _has_json(root):
  return any(_json(root, split).exists() for split in SPLITS)


def _json(root, split):
  return root / f"{split}.json"


def _trees(root):
  """The splits that have directories, if one of them has classes."""
  trees = [split for split in SPLITS if (root / split).is_dir()]
  return trees if any(_is_of_classes(root / split) for split in trees) else []


def _from_json(root, folders):
  mentions = [m for split in SPLITS for m in _mentions(root, split)]
  kinds = {type(entry.label) for entry in mentions}
  if len(kinds) > 1:
    raise ValueError(f"classes in {root}/*.json are numbers here, text there")
  wrong = repeated(mentions)
  names = list(dict.fromkeys(entry.name for entry in mentions))
  bases = [root / folder for folder in folders]
  # Where most of the first names are; a hundred tell.
  base = max(
    bases, key=lambda b: sum((b / name).is_file() for name in names[:100])
  )
  return Listing(base, _sorted(mentions), wrong)


def _mentions(root, split):
  """The entries of a split's file, repeated ones repeated."""
  file = _json(root, split)
  if not file.is_file():
    raise ValueError(f"{file} is missing; each of {SPLITS} needs one")
  try:
    # A dict would keep the last of equal names, and say nothing.
    pairs = json.loads(file.read_bytes(), object_pairs_hook=tuple)
  except ValueError as error:
    raise ValueError(f"{file} is no JSON: {error}") from error
  is_map = isinstance(pairs, tuple) and all(
    type(label) in (str, int) for _, label in pairs
  )
  if not is_map:
    raise ValueError(
      f'{file} must be one object {{"name of file": class}}, a class being a'
      " whole number or text"
    )
  return [Entry(posixpath.normpath(n), label, split) for n, label in pairs]


def repeated(mentions: Iterable[Entry]) -> dict[str, str]:
  """Names mentioned more than once, and where."""
  splits = collections.defaultdict(list)
  for entry in mentions:
    splits[entry.name].append(entry.split)
  return {
    name: f"named {len(where)} times, in {' and '.join(dict.fromkeys(where))}"
    for name, where in splits.items()
    if len(where) > 1
  }


def _is_of_classes(directory):
  return any(
    child.is_dir() and not child.name.startswith(".")
    for child in directory.iterdir()
  )


def _from_trees(root):
  entries = []
  ignored = stray = 0
  for split in SPLITS:
    names, outside, others = walk(root / split)
    entries += [Entry(f"{split}/{n}", n.split("/")[0], split) for n in names]
    stray += outside
    ignored += others
  return Listing(root, _sorted(entries), {}, ignored, stray)


def _from_classes(root):
  names, stray, ignored = walk(root)
  if not names:
    raise ValueError(f"no images in {root}; there must be\n{LAYOUTS}")
  by_class = collections.defaultdict(list)
  for name in names:
    by_class[name.split("/")[0]].append(name)
  if by_class.keys() <= set(SPLITS):
    raise ValueError(
      f"{root} has the splits {', '.join(by_class)}, and no directories of"
      f" classes in them; there must be\n{LAYOUTS}"
    )
  entries = [
    Entry(name, label, split)
    for label, members in by_class.items()
    for name, split in _split(members)
  ]
  return Listing(root, _sorted(entries), {}, ignored, stray)


def _split(names):
  """Pairs of name and split: the same for the same names, on any machine.

  Names are ordered by a hash, so that one more file moves few others. Of three
  files each split gets one; of fewer, none but training.
  """

  def place(name):
    return hashlib.md5(f"roli_jax/{name}".encode(errors="surrogateescape"))

  ordered = sorted(names, key=lambda name: place(name).digest())
  for split, share in _SHARES.items():
    count = max(1, round(share * len(names))) if len(names) > 2 else 0
    yield from ((name, split) for name in ordered[:count])
    ordered = ordered[count:]
  yield from ((name, "train") for name in ordered)


def walk(root: pathlib.Path) -> tuple[list[str], int, int]:
  """Images in directories under a root; how many outside; how many no images.

  Hidden directories are passed over, links followed.
  """
  names, stray, ignored = [], 0, 0
  for folder, below, files in os.walk(root, followlinks=True):
    below[:] = [name for name in below if not name.startswith(".")]
    for name in files:
      suffix = os.path.splitext(name)[1].lower()
      if name.startswith(".") or suffix not in picture.SUFFIXES:
        ignored += 1
      elif pathlib.Path(folder) == pathlib.Path(root):
        stray += 1
      else:
        names.append(pathlib.Path(folder, name).relative_to(root).as_posix())
  return sorted(names), stray, ignored


def _sorted(entries):
  return tuple(sorted(entries, key=lambda e: (e.name, SPLITS.index(e.split))))
