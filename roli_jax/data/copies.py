"""Images that two splits share: one file under two names, or equal bytes."""

import collections
import itertools
import os
import pathlib
from collections.abc import (
  Callable,
  Container,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)

from roli_jax.data import walk
from roli_jax.data.listing import Entry
from roli_jax.data.source import SPLITS

_MOST = 0.01  # share of the test that training may have seen

Group = list[Entry]  # entries of equal bytes
Pair = tuple[Entry, Entry]  # an entry, and its copy in a split before


def shared(entries: Iterable[Entry], digests: Mapping[str, str]) -> list[Group]:
  """Finds groups of equal bytes that lie in more than one split or class.

  Args:
    entries: the images of a data set.
    digests: name -> digest of the file's bytes; names without one are no
      copies.
  """
  sound = [entry for entry in entries if entry.name in digests]
  return _mixed(sound, lambda entry: digests[entry.name])


def one_file(groups: Iterable[Group], base: pathlib.Path) -> dict[str, str]:
  """Finds names that links make of one file, in two splits or classes; and how.

  Args:
    groups: groups of equal bytes, which one file under two names has too.
    base: where names start.
  """
  entries = itertools.chain.from_iterable(groups)
  wrong = {}
  for same in _mixed(entries, lambda e: os.path.realpath(base / e.name)):
    first, second, *_ = [entry.name for entry in same]
    for entry in same:
      other = second if entry.name == first else first
      wrong[entry.name] = f"the same file as {other}"
  return wrong


def _mixed(
  entries: Iterable[Entry], key: Callable[[Entry], str]
) -> list[Group]:
  """Groups entries by a key; keeps groups of more than one split or class."""
  groups = collections.defaultdict(list)
  for entry in entries:
    groups[key(entry)].append(entry)
  return [
    group
    for group in groups.values()
    if len({(entry.split, entry.label) for entry in group}) > 1
  ]


def across(groups: Iterable[Group], bad: Container[str]) -> list[Group]:
  """Leaves out bad names; keeps groups that lie in more than one split then."""
  sound = [[e for e in group if e.name not in bad] for group in groups]
  return [g for g in sound if len({entry.split for entry in g}) > 1]


def before_last(groups: Iterable[Group]) -> set[str]:
  """Finds names that training, or validation, shares with a split after it."""
  found = set()
  for group in groups:
    last = max(map(_order, group))
    found |= {entry.name for entry in group if _order(entry) < last}
  return found


def check(groups: Sequence[Group], tested: int, base: pathlib.Path) -> None:
  """Refuses a test of which training has seen too much.

  A copy under another class makes no number better: it does not count.

  Args:
    groups: groups of equal bytes that stand in more than one split.
    tested: the number of test images.
    base: where names start.

  Raises:
    ValueError: over 1% of the test has a copy of its class elsewhere.
  """
  pairs = [
    (entry, other)
    for entry, other in _pairs(groups, "test")
    if other.label == entry.label
  ]
  if len(pairs) > _MOST * tested:
    raise ValueError(
      f"{len(pairs)} of {tested} test images in {base} have the same bytes as"
      " images of train or val, over 1%:\n"
      f"  {_shown(pairs)}\n"
      "  Remove the copies, or --config.data.policy=skip leaves them out of"
      " training and validation; the test stays."
    )


def notes(groups: Sequence[Group]) -> Iterator[str]:
  """Yields how many images of the test, and of validation, training has too."""
  for split, where in (("test", "train or val"), ("val", "train")):
    pairs = _pairs(groups, split)
    if pairs:
      others = sum(entry.label != other.label for entry, other in pairs)
      yield (
        f"{len(pairs)} {split} images have the same bytes as images of {where}"
        + (f", {others} of them under another class" if others else "")
        + f" ({_shown(pairs)})"
      )


def _pairs(groups: Iterable[Group], split: str) -> list[Pair]:
  """Pairs a split's entries with copies before it, of their class if any is."""
  pairs = []
  for group in groups:
    before = [e for e in group if _order(e) < SPLITS.index(split)]
    by_label = {entry.label: entry for entry in before}
    pairs += [
      (entry, by_label.get(entry.label, before[0]))
      for entry in group
      if before and entry.split == split
    ]
  return pairs


def _order(entry: Entry) -> int:
  return SPLITS.index(entry.split)


def _shown(pairs: Iterable[Pair]) -> str:
  return walk.some(f"{entry.name} = {other.name}" for entry, other in pairs)
