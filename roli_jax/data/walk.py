"""What lies under a directory: images, and what is passed over."""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping

from roli_jax.data import decode

# What a directory, or a JSON file, of a split may be called, in any case.
SPLIT_NAMES = {
  "train": "train", "training": "train",
  "val": "val", "valid": "val", "validation": "val", "eval": "val",
  "test": "test", "testing": "test",
}  # fmt: skip

_NAMED = 5  # of each kind, in a note


@dataclasses.dataclass(frozen=True)
class Walked:
  """Names under a directory, of all kinds, sorted.

  Attributes:
    images: in directories below it.
    stray: images in the directory itself.
    others: files that are no images by their suffix, or hidden.
    folders: the directories in it.
    loops: directories that lead back to one that they lie in.
  """

  images: tuple[str, ...]
  stray: tuple[str, ...]
  others: tuple[str, ...]
  folders: tuple[str, ...]
  loops: tuple[str, ...]


def walk(root: pathlib.Path) -> Walked:
  """Lists all that lies under a directory.

  Hidden directories are passed over. Links are followed, but a directory that
  lies on its own path is not entered again.

  Raises:
    ValueError: a directory can't be read.
  """
  files: list[str] = []
  loops: list[str] = []

  def enter(folder: str, prefix: str, path: set[str]) -> None:
    real = os.path.realpath(folder)
    if real in path:
      loops.append(prefix.rstrip("/"))
      return
    inner, names = _children(folder)
    files.extend(prefix + name for name in names)
    for name in inner:
      enter(os.path.join(folder, name), f"{prefix}{name}/", {*path, real})

  enter(str(root), "", set())
  files.sort()
  images = [name for name in files if _is_image(name)]
  return Walked(
    images=tuple(name for name in images if "/" in name),
    stray=tuple(name for name in images if "/" not in name),
    others=tuple(name for name in files if not _is_image(name)),
    folders=tuple(sorted(folders(root))),
    loops=tuple(sorted(loops)),
  )


def folders(root: pathlib.Path) -> list[str]:
  """Lists the directories in a directory, without the hidden."""
  return _children(root)[0]


def named(root: pathlib.Path) -> tuple[dict[str, list[str]], list[str]]:
  """Lists the directories in one: by split, those called as one; and others."""
  trees: dict[str, list[str]] = {}
  others: list[str] = []
  for name in sorted(folders(root)):
    split = SPLIT_NAMES.get(name.lower())
    (trees.setdefault(split, []) if split else others).append(name)
  return trees, others


def has_images(root: pathlib.Path) -> bool:
  """Whether there is an image in a directory or below."""
  found = walk(root)
  return bool(found.images or found.stray)


def by_folder(names: Iterable[str]) -> dict[str, list[str]]:
  """Groups names by the first directory of their path: of images, the class."""
  groups = collections.defaultdict(list)
  for name in names:
    groups[name.split("/")[0]].append(name)
  return groups


def _children(folder: str | pathlib.Path) -> tuple[list[str], list[str]]:
  """Lists directories and files; what macOS adds to archives is hidden."""
  try:
    with os.scandir(folder) as entries:
      children = [(entry.name, _is_dir(entry)) for entry in entries]
  except OSError as error:
    raise ValueError(f"{folder} can't be read: {error.strerror}") from error
  return (
    [n for n, is_dir in children if is_dir and not _is_hidden(n)],
    [n for n, is_dir in children if not is_dir],
  )


def _is_dir(entry: os.DirEntry[str]) -> bool:
  try:
    return entry.is_dir()
  except OSError:  # a link to itself, which is as good as broken
    return False


def _is_hidden(name: str) -> bool:
  return name.startswith(".") or name == "__MACOSX"


def _suffix(name: str) -> str:
  """Returns the suffix in lower case; "" if hidden, or without one."""
  base = os.path.basename(name)
  return "" if _is_hidden(base) else os.path.splitext(base)[1].lower()


def _is_image(name: str) -> bool:
  return _suffix(name) in decode.SUFFIXES


def suffixes(names: Iterable[str]) -> str:
  """Counts these files by suffix, as `3 .jp2, 1 .txt`; "" if there are none."""
  counts = collections.Counter(_suffix(name) or "other" for name in names)
  most = [f"{count} {suffix}" for suffix, count in counts.most_common(_NAMED)]
  return ", ".join(most) + (", ..." if len(counts) > _NAMED else "")


def some(names: Iterable[str]) -> str:
  """Joins the first five of these names, for a message."""
  names = list(names)
  return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def passed_over(walks: Mapping[str, Walked]) -> Iterator[str]:
  """Yields what was found and is not in the data set, a line for each kind.

  Args:
    walks: directories of classes, by what stands before their names, such as
      `train/`.
  """
  classes = by_folder(n for found in walks.values() for n in found.images)
  others = [name for found in walks.values() for name in found.others]
  if others:
    known = decode.known()
    unread = [name for name in others if _suffix(name) in known]
    yield (
      f"{len(others)} files without an image's suffix ignored"
      + (
        f"; PIL knows {suffixes(unread)}, which are not read here: convert"
        " them to PNG"
        if unread
        else ""
      )
    )
  stray = sum(len(found.stray) for found in walks.values())
  if stray:
    yield f"{stray} images outside classes' directories ignored"
  loops = [
    prefix + name for prefix, found in walks.items() for name in found.loops
  ]
  if loops:
    yield (
      f"{len(loops)} directories lead back to one that they lie in, and are"
      f" not entered again ({some(loops)})"
    )
  empty = []
  for prefix, found in walks.items():
    inside = by_folder(found.others)
    for folder in found.folders:
      if folder not in classes:
        held = suffixes(inside.get(folder, ())) or "nothing"
        empty.append(f"{prefix}{folder}: {held}")
  if empty:
    yield (
      f"{len(empty)} directories without an image are no classes"
      f" ({some(empty)})"
    )
