"""Which files a data set has, of which class and in which split."""

import collections
import dataclasses
import hashlib
import json
import pathlib
import posixpath
from collections.abc import Iterable

from roli_jax.data import levels, walk
from roli_jax.data.source import SPLITS

# Of each class, where the user made no split; the rest trains.
_SHARES = {"test": 0.2, "val": 0.1}

# What directories at a root may be said to be.
WAYS = ("classes", "splits")

LAYOUTS = """\
  ROOT/{train,val,test}/CLASS/NAME.jpg, of val and test one at least, or
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
    notes: how directories were taken, a line each.
    passed_over: what of them was left, a line each.
  """

  base: pathlib.Path
  entries: tuple[Entry, ...]
  wrong: dict[str, str]
  notes: tuple[str, ...] = ()
  passed_over: tuple[str, ...] = ()


def read(
  root: pathlib.Path, folders: Iterable[str], layout: str = ""
) -> Listing:
  """The data set at a root: from JSON splits if it has them, else from trees.

  Args:
    root: an existing directory.
    folders: under it, where the images of JSON splits may be; "." for itself.
    layout: "classes" or "splits" is what its directories are, whatever their
      names; "" looks at these, and refuses what may be either.

  Raises:
    ValueError: neither is there, or JSON that is no map of names to classes;
      directories that are neither all splits nor all classes.
  """
  if layout != "classes":
    files = jsons(root)
    if files:
      return _from_json(root, files, folders)
    trees, others = walk.named(root)
    if trees:
      others = [name for name in others if walk.has_images(root / name)]
      if others and layout != "splits":
        raise ValueError(_mixed(root, trees, others))
      return _from_trees(root, trees, others)
    if layout == "splits":
      raise ValueError(
        f"{root} has no split, which data.layout=splits asks for; there must"
        f" be\n{LAYOUTS}"
      )
  return _from_classes(root, looks=not layout)


def has_splits(root: pathlib.Path) -> bool:
  """Whether there are splits of the user's, as JSON or as trees."""
  trees, _ = walk.named(root) if root.is_dir() else ({}, [])
  return bool(jsons(root)) or any(
    walk.folders(root / name) for names in trees.values() for name in names
  )


def jsons(root: pathlib.Path) -> dict[str, pathlib.Path]:
  """The files of JSON splits at a root, by split.

  Raises:
    ValueError: two of them are the same split by their names.
  """
  found = collections.defaultdict(list)
  for file in sorted(root.glob("*.[jJ][sS][oO][nN]")):
    split = walk.SPLIT_NAMES.get(file.stem.lower())
    if split and file.is_file():
      found[split].append(file.name)
  return {split: root / n for split, n in _single(root, found).items()}


def _single(root, found):
  """The one name of each split."""
  for split, names in found.items():
    if len(names) > 1:
      raise ValueError(
        f"{root} has both {' and '.join(names)}, which are one split by their"
        f" names, {split}; rename one of them, or move it elsewhere"
      )
  return {split: name for split, (name,) in found.items()}


def _mixed(root, trees, others):
  named = [name for names in trees.values() for name in names]
  return (
    f"{root} has directories named like splits ({walk.some(named)}) and others"
    f" with images ({walk.some(others)}). If all are classes,\n"
    "  --config.data.layout=classes; if the first are the splits, and the"
    " others not of\n"
    "  the data set, --config.data.layout=splits."
  )


def _from_json(root, files, folders):
  for split in SPLITS:
    if split not in files:
      raise ValueError(
        f"{root / split}.json is missing; each of {SPLITS} needs one"
      )
  mentions = [m for split in SPLITS for m in _mentions(files[split], split)]
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


def _mentions(file, split):
  """The entries of a split's file, repeated ones repeated."""
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


def _from_trees(root, trees, others):
  """Splits as they lie; one that lacks is another, or drawn from another."""
  folders = _single(root, trees)
  if "train" not in folders or len(folders) == 1:
    raise ValueError(_lacking(root, folders))
  walks = {name: walk.walk(root / name) for name in folders.values()}
  for split, name in folders.items():
    if not walks[name].images:
      raise ValueError(_bare(root / name, walks[name], split))
  parts = {split: (name, walks[name].images) for split, name in folders.items()}
  notes = []
  if "test" not in parts:
    parts["test"] = parts.pop("val")
    notes.append(f"no directory of a test: {folders['val']}/ is the test")
  if "val" not in parts:
    name, images = parts["train"]
    drawn = _drawn(images, {"val": _SHARES["val"]})
    parts |= {split: (name, own) for split, own in drawn.items()}
    notes.append(
      f"no directory of validation: a tenth of each class of {name}/ is, by a"
      " hash of names"
    )
  if others:
    notes.append(f"directories beside the splits ignored: {walk.some(others)}")
  every = [image for found in walks.values() for image in found.images]
  levels.check_classes(root / folders["train"], every, "move what is in {} up")
  entries = [
    Entry(f"{name}/{image}", image.split("/")[0], split)
    for split, (name, images) in parts.items()
    for image in images
  ]
  return Listing(
    root,
    _sorted(entries),
    {},
    (*notes, *levels.alike(every)),
    walk.passed_over({f"{name}/": found for name, found in walks.items()}),
  )


def _bare(folder, found, split):
  lie = walk.suffixes((*found.stray, *found.others))
  return (
    f"{folder}: there are no images for {split} in directories of classes"
    + (f", but {lie}" if lie else "")
    + "; without labels they must lie elsewhere" * bool(found.stray)
  )


def _lacking(root, places):
  has = " and ".join(f"{places[s]}/" for s in SPLITS if s in places)
  if len(places) > 1:
    return f"{root} has {has}, but no directory train/"
  (name,) = places.values()
  lacks = "val/ or test/" if "train" in places else "train/"
  return (
    f"{root} has {has}, but no directory {lacks};"
    f" --config.data.root={root / name} splits its classes 70:10:20"
  )


def _from_classes(root, looks):
  """A split that we draw.

  Args:
    root: which holds the classes.
    looks: whether directories that can't be meant as classes are refused.
  """
  found = walk.walk(root)
  if not found.images:
    lie = walk.suffixes((*found.stray, *found.others))
    raise ValueError(
      f"no images in directories of {root}"
      + (f", but {lie}" if lie else "")
      + f"; there must be\n{LAYOUTS}"
    )
  if looks:
    levels.check_splits(root, found.images)
  levels.check_classes(root, found.images, "--config.data.root={}")
  entries = [
    Entry(name, name.split("/")[0], split)
    for split, names in _drawn(found.images, _SHARES).items()
    for name in names
  ]
  return Listing(
    root,
    _sorted(entries),
    {},
    (
      "no splits: each class is split 70:10:20, by a hash of names",
      *levels.beside(root),
      *levels.alike(found.images),
    ),
    walk.passed_over({"": found}),
  )


def _drawn(names, shares):
  """Names by split, each class by itself."""
  by_class = collections.defaultdict(list)
  for name in names:
    by_class[name.split("/")[0]].append(name)
  parts = collections.defaultdict(list)
  for members in by_class.values():
    for name, split in _split(members, shares):
      parts[split].append(name)
  return {split: parts[split] for split in ("train", *shares)}


def _split(names, shares=_SHARES):
  """Pairs of name and split: the same for the same names, on any machine.

  Names are ordered by a hash, so that one more file moves few others. Where
  there are as many files as splits, each split gets one; of fewer, none but
  training.
  """

  def place(name):
    return hashlib.md5(f"roli_jax/{name}".encode(errors="surrogateescape"))

  ordered = sorted(names, key=lambda name: place(name).digest())
  for split, share in shares.items():
    enough = len(names) > len(shares)
    count = max(1, round(share * len(names))) if enough else 0
    yield from ((name, split) for name in ordered[:count])
    ordered = ordered[count:]
  yield from ((name, "train") for name in ordered)


def _sorted(entries):
  return tuple(sorted(entries, key=lambda e: (e.name, SPLITS.index(e.split))))
