"""Whether directories lie at the level where classes and splits should."""

import collections
import os
import pathlib
from collections.abc import Iterable, Iterator

from roli_jax.data import walk


def check_classes(place: pathlib.Path, names: Iterable[str], cure: str) -> None:
  """Refuses a class that is alone: there is nothing to tell it from.

  Args:
    place: the directory that holds the classes.
    names: images, under it.
    cure: what to do if the classes lie in `{}`.

  Raises:
    ValueError: there is one class; the message has what it holds.
  """
  inside = _inside(names)
  if len(inside) != 1:
    return
  ((label, below),) = inside.items()
  below -= {""}
  cause = (
    f"there are {walk.some(sorted(below))}; if these are the classes, or the"
    f" splits,\n  the root is one level too high: {cure.format(place / label)}"
    if below
    else "there are only images; each class needs a directory"
  )
  raise ValueError(
    f"{place} has one class, {label}, and two are needed. In {label}/ {cause}."
  )


def check_splits(root: pathlib.Path, names: Iterable[str]) -> None:
  """Refuses splits that lie where a class should.

  Args:
    root: the directory that holds the classes.
    names: images, under it.

  Raises:
    ValueError: a class has directories of several splits, and nothing else.
  """
  for label, below in sorted(_inside(names).items()):
    splits = {walk.SPLIT_NAMES.get(name.lower()) for name in below}
    if None not in splits and len(splits) > 1:
      raise ValueError(
        f"{root} has no splits, but its directory {label}/ has:"
        f" {walk.some(sorted(below))}. If that is the data set, the root is one"
        f" level\n  too high: --config.data.root={root / label}. If {label} is"
        " a class: --config.data.layout=classes."
      )


def alike(names: Iterable[str]) -> Iterator[str]:
  """Yields a line if directories in classes are named like classes, or alike.

  Args:
    names: images, under the directory that holds the classes.
  """
  inside = _inside(names)
  owners = collections.defaultdict(list)
  for label, below in inside.items():
    for name in below - {""}:
      owners[name].append(label)
  found = sorted(
    f"{label}/{name}"
    for name, labels in owners.items()
    if name in inside or len(labels) > 1
    for label in labels
  )
  if found:
    yield (
      "directories in classes are named like classes, or alike"
      f" ({walk.some(found)}), and count as the class that they lie in: is the"
      " root one level too high, or the data set there twice?"
    )


def beside(root: pathlib.Path) -> Iterator[str]:
  """Yields a line if splits lie beside a root that is itself called as one."""
  root = root.resolve()
  is_split = root.name.lower() in walk.SPLIT_NAMES
  if not (is_split and os.access(root.parent, os.R_OK)):
    return
  trees, _ = walk.named(root.parent)
  others = [n for names in trees.values() for n in names if n != root.name]
  if others:
    yield (
      f"{walk.some(others)} beside {root.name}/ not used;"
      f" --config.data.root={root.parent} takes them"
    )


def _inside(names: Iterable[str]) -> dict[str, set[str]]:
  """Returns by class the directories straight in it; "" where images are."""
  inside = collections.defaultdict(set)
  for name in names:
    label, *below, _ = name.split("/")
    inside[label].add(below[0] if below else "")
  return inside
