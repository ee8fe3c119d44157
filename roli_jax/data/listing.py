"""Which files a data set has, of which class and in which split."""

import collections
import dataclasses
import hashlib
import json
import pathlib
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence

from roli_jax.data import levels, walk
from roli_jax.data.source import SPLITS

# Shares of each class, where the user made no split; the rest trains.
_SHARES = {"test": 0.2, "val": 0.1}

# What `layout` may say that the directories at a root are.
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


# By split: what stands before names, such as `train/`, and images by class.
Parts = dict[str, tuple[str, Sequence[str]]]


@dataclasses.dataclass(frozen=True)
class Listing:
  """The files of a data set, in the order of names.

  Attributes:
    base: where names start.
    entries: one for each time that a file is named.
    wrong: names that stand in more than one place -> where.
    notes: how directories were taken, a line each.
    passed_over: what lies there and is not taken, a line each.
  """

  base: pathlib.Path
  entries: tuple[Entry, ...]
  wrong: Mapping[str, str] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()
  passed_over: tuple[str, ...] = ()


def read(
  root: pathlib.Path, folders: Iterable[str], layout: str = ""
) -> Listing:
  """Lists the data set at a root: by JSON splits if it has them, else by trees.

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
        called = [name for names in trees.values() for name in names]
        raise ValueError(
          f"{root} has directories named like splits ({walk.some(called)}) and"
          f" others with images ({walk.some(others)}). If all are classes,\n"
          "  --config.data.layout=classes; if the first are the splits, and the"
          " others not of\n"
          "  the data set, --config.data.layout=splits."
        )
      return _from_trees(root, trees, others)
    if layout == "splits":
      raise ValueError(
        f"{root} has no split, which data.layout=splits asks for; there must"
        f" be\n{LAYOUTS}"
      )
  return _from_classes(root, may_be_splits=not layout)


def has_splits(root: pathlib.Path) -> bool:
  """Whether there are splits of the user's, as JSON or as trees."""
  trees, _ = walk.named(root) if root.is_dir() else ({}, [])
  return bool(jsons(root)) or any(
    walk.folders(root / name) for names in trees.values() for name in names
  )


def jsons(root: pathlib.Path) -> dict[str, pathlib.Path]:
  """Finds the files of JSON splits at a root, by split.

  Raises:
    ValueError: two of them are the same split by their names.
  """
  found = collections.defaultdict(list)
  for file in sorted(root.glob("*.[jJ][sS][oO][nN]")):
    split = walk.SPLIT_NAMES.get(file.stem.lower())
    if split and file.is_file():
      found[split].append(file.name)
  return {split: root / n for split, n in single(root, found).items()}


def single(
  root: pathlib.Path, found: Mapping[str, Sequence[str]]
) -> dict[str, str]:
  """Returns the one name of each split.

  Args:
    root: where they lie, for the message.
    found: names by split.

  Raises:
    ValueError: a split has two.
  """
  for split, names in found.items():
    if len(names) > 1:
      raise ValueError(
        f"{root} has both {' and '.join(names)}, which are one split by their"
        f" names, {split}; rename one of them, or move it elsewhere"
      )
  return {split: name for split, (name,) in found.items()}


def _from_json(
  root: pathlib.Path,
  files: Mapping[str, pathlib.Path],
  folders: Iterable[str],
) -> Listing:
  for split in SPLITS:
    if split not in files:
      raise ValueError(
        f"{root / split}.json is missing; each of {SPLITS} needs one"
      )
  mentions = [m for split in SPLITS for m in _mentions(files[split], split)]
  kinds = {type(entry.label) for entry in mentions}
  if len(kinds) > 1:
    raise ValueError(f"classes in {root}/*.json are numbers here, text there")
  names = list(dict.fromkeys(entry.name for entry in mentions))
  bases = [root / folder for folder in folders]
  # Where most of the first names are; a hundred tell.
  base = max(
    bases, key=lambda b: sum((b / name).is_file() for name in names[:100])
  )
  return Listing(base, _sorted(mentions), repeated(mentions))


def _mentions(file: pathlib.Path, split: str) -> list[Entry]:
  """Reads the entries of a split's file, repeated ones repeated."""
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
  """Finds names that are mentioned more than once, and where."""
  splits = collections.defaultdict(list)
  for entry in mentions:
    splits[entry.name].append(entry.split)
  return {
    name: f"named {len(where)} times, in {' and '.join(dict.fromkeys(where))}"
    for name, where in splits.items()
    if len(where) > 1
  }


def _from_trees(
  root: pathlib.Path, trees: Mapping[str, Sequence[str]], others: Sequence[str]
) -> Listing:
  """Takes splits as they lie; validation may be the test, or be drawn."""
  folders = {split: f"{n}/" for split, n in single(root, trees).items()}
  if "train" not in folders or len(folders) == 1:
    raise ValueError(_lacking(root, folders))
  walks = {name: walk.walk(root / name) for name in folders.values()}
  for split, name in folders.items():
    found = walks[name]
    if not found.images:
      lie = "; without labels they must lie elsewhere" if found.stray else ""
      raise ValueError(
        f"{root / name}: there are no images for {split} in directories of"
        f" classes{_but(found)}{lie}"
      )
  parts: Parts = {
    split: (name, walks[name].images) for split, name in folders.items()
  }
  notes = []
  if "test" not in parts:
    parts["test"] = parts.pop("val")
    notes.append(f"no directory of a test: {folders['val']} is the test")
  if "val" not in parts:
    name, images = parts["train"]
    drawn = _drawn(images, {"val": _SHARES["val"]})
    parts |= {split: (name, chosen) for split, chosen in drawn.items()}
    notes.append(
      f"no directory of validation: a tenth of each class of {name} is, by a"
      " hash of names"
    )
  if others:
    notes.append(f"directories beside the splits ignored: {walk.some(others)}")
  every = [image for found in walks.values() for image in found.images]
  levels.check_classes(root / folders["train"], every, "move what is in {} up")
  return Listing(
    root,
    _entries(parts),
    notes=(*notes, *levels.alike(every)),
    passed_over=tuple(walk.passed_over(walks)),
  )


def _but(found: walk.Walked) -> str:
  """Says what lies in a directory without images in classes, for a message."""
  lie = walk.suffixes((*found.stray, *found.others))
  return f", but {lie}" if lie else ""


def _lacking(root: pathlib.Path, places: Mapping[str, str]) -> str:
  has = " and ".join(places[s] for s in SPLITS if s in places)
  if len(places) > 1:
    return f"{root} has {has}, but no directory train/"
  (name,) = places.values()
  lacks = "val/ or test/" if "train" in places else "train/"
  return (
    f"{root} has {has}, but no directory {lacks};"
    f" --config.data.root={root / name} splits its classes 70:10:20"
  )


def _from_classes(root: pathlib.Path, may_be_splits: bool) -> Listing:
  """Draws a split of directories of classes.

  Args:
    root: the directory that holds the classes.
    may_be_splits: whether directories that hold splits are refused, since
      nobody said that they are classes.
  """
  found = walk.walk(root)
  if not found.images:
    raise ValueError(
      f"no images in directories of {root}{_but(found)}; there must"
      f" be\n{LAYOUTS}"
    )
  if may_be_splits:
    levels.check_splits(root, found.images)
  levels.check_classes(root, found.images, "--config.data.root={}")
  drawn = _drawn(found.images, _SHARES)
  return Listing(
    root,
    _entries({split: ("", names) for split, names in drawn.items()}),
    notes=(
      "no splits: each class is split 70:10:20, by a hash of names",
      *levels.beside(root),
      *levels.alike(found.images),
    ),
    passed_over=tuple(walk.passed_over({"": found})),
  )


def _entries(parts: Parts) -> tuple[Entry, ...]:
  return _sorted(
    Entry(prefix + image, image.split("/")[0], split)
    for split, (prefix, images) in parts.items()
    for image in images
  )


def _drawn(
  names: Iterable[str], shares: Mapping[str, float]
) -> dict[str, list[str]]:
  """Draws shares of each class; returns names by split."""
  parts: dict[str, list[str]] = {split: [] for split in ("train", *shares)}
  for members in walk.by_folder(names).values():
    for name, split in _split(members, shares):
      parts[split].append(name)
  return parts


def _split(
  names: Sequence[str], shares: Mapping[str, float] = _SHARES
) -> Iterator[tuple[str, str]]:
  """Yields pairs of name and split, for the same names the same on any machine.

  Names are ordered by a hash, so that one more file moves few others. Where
  there are as many files as splits, each split gets one; of fewer, none but
  training.
  """

  def place(name: str) -> bytes:
    text = f"roli_jax/{name}".encode(errors="surrogateescape")
    return hashlib.md5(text).digest()

  ordered = sorted(names, key=place)
  for split, share in shares.items():
    enough = len(names) > len(shares)
    count = max(1, round(share * len(names))) if enough else 0
    yield from ((name, split) for name in ordered[:count])
    ordered = ordered[count:]
  yield from ((name, "train") for name in ordered)


def _sorted(entries: Iterable[Entry]) -> tuple[Entry, ...]:
  return tuple(sorted(entries, key=lambda e: (e.name, SPLITS.index(e.split))))
