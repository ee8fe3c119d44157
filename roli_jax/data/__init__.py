"""Data sets by name."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from roli_jax import specs
from roli_jax.data import (
  archives,
  cifar,
  folder,
  glyphs,
  homes,
  hub,
  listing,
  transforms,
)
from roli_jax.data.folder import Files
from roli_jax.data.pipeline import train_batches
from roli_jax.data.sizes import FACTS, Facts
from roli_jax.data.source import SPLITS, Missing, Source

# (split, root) -> source
IN_MEMORY: dict[str, Callable[[str, str], Source]] = {
  "cifar10": functools.partial(cifar.build, "cifar10"),
  "cifar100": functools.partial(cifar.build, "cifar100"),
  "digits": lambda split, root: glyphs.digits(split),
  "letters": lambda split, root: glyphs.letters(split),
}
IN_FILES = ("folder", *folder.NAMED, *archives.ARCHIVES)

_FIELDS: dict[str, Any] = {
  "train_size": 0,  # for `Source.subset`
  "root": "",
  "policy": "error",
  "layout": "",
  "download": False,
  "num_workers": 0,  # for `train_batches`
  "train_transforms": None,
  "eval_transforms": None,
}


def build(spec: Mapping[str, Any] | str, split: str) -> Source:
  """Reads a split of the data set that a config names.

  Args:
    spec: `name`, and what else docs/data.md lists, or a name alone.
      Transforms that are None are the data set's own: none in memory, RoLI's
      of 224 pixels for files, the Guide's for its six.
    split: `train`, `val` or `test`.

  Raises:
    ValueError: unknown names, transforms that do not fit, data that is not
      there (the message has what must lie where) and, if `download` is true,
      can't be fetched; bad files, if `policy` is "error".
  """
  if split not in SPLITS:
    raise ValueError(f"unknown split {split!r}; there are {SPLITS}")
  fields = _checked(spec)
  try:
    return _read(fields, split)
  except Missing:
    if not fields["download"]:
      raise
  for line in prepare(spec):
    logging.warning("%s", line)
  return _read(fields, split)


def prepare(spec: Mapping[str, Any] | str) -> Iterator[str]:
  """Fetches a data set, if it is not there.

  Args:
    spec: as for `build`.

  Yields:
    What it is about to do, or has found, a line each.

  Raises:
    ValueError: it can't be fetched, or has no home that it can be fetched from;
      the message says what to do.
  """
  fields = _checked(spec)
  name, root = fields["name"], fields["root"]
  try:
    _find(fields)
  except Missing:
    if name.startswith(hub.PREFIX):
      yield from hub.fetch(name, root)
    elif name in homes.HOMES:
      yield from homes.fetch(name, root)
    else:
      raise
    _find(fields)
  yield f"{name} is there"


def _resolved(fields: Mapping[str, Any]) -> tuple[str, str]:
  """Returns the name and the root that a data set is read by."""
  name, root = fields["name"], fields["root"]
  return (
    hub.resolve(name, root) if name.startswith(hub.PREFIX) else (name, root)
  )


def _find(fields: Mapping[str, Any]) -> None:
  """Raises what reading would, if the data is not there; reads no image."""
  name, root = _resolved(fields)
  if name in IN_FILES:
    folder.find(name, root, fields["layout"])
  elif name in homes.HOMES:
    cifar.find(name, root)


def _read(fields: Mapping[str, Any], split: str) -> Source:
  name, root = _resolved(fields)
  train, held = (transforms.build(t) for t in _texts({**fields, "name": name}))
  if name in IN_FILES:
    transforms.check(train, held, None, channels=3)
    policy, layout = fields["policy"], fields["layout"]
    source: Source = folder.build(name, split, root, policy, layout)
  else:
    height, width, channels = FACTS[name].shape
    transforms.check(train, held, (height, width), channels)
    source = IN_MEMORY[name](split, root)
  return dataclasses.replace(
    source, split=split, train_transforms=train, eval_transforms=held
  )


def _checked(spec: Mapping[str, Any] | str) -> dict[str, Any]:
  """Returns all fields; raises a ValueError for unknown or wrong ones."""
  spec = {"name": spec} if isinstance(spec, str) else spec
  for field in spec:
    if field != "name":
      specs.lookup(_FIELDS, field, "field of data")
  fields = {**_FIELDS, **spec}
  known = dict.fromkeys((*IN_MEMORY, *IN_FILES))
  if not fields["name"].startswith(hub.PREFIX):
    specs.lookup(known, fields["name"], "data set")
  policies = dict.fromkeys(folder.POLICIES)
  specs.lookup(policies, fields["policy"], "data.policy")
  if fields["layout"]:
    specs.lookup(dict.fromkeys(listing.WAYS), fields["layout"], "data.layout")
    if fields["name"] != "folder":
      raise ValueError(
        f"data.layout is of data.name=folder; {fields['name']} lies as"
        " docs/data.md says"
      )
  if fields["num_workers"] < 0:
    raise ValueError(
      f"data.num_workers must be >= 0, got {fields['num_workers']}"
    )
  return fields


def _texts(fields: Mapping[str, Any]) -> Iterator[Sequence[str]]:
  """Yields the train and the eval transforms, the data set's own where None."""
  defaults: tuple[Sequence[str], Sequence[str]] = (), ()
  if fields["name"] in archives.ARCHIVES:
    defaults = transforms.GUIDE_TRAIN, transforms.GUIDE_EVAL
  elif fields["name"] in IN_FILES:
    defaults = transforms.PHOTO_TRAIN, transforms.PHOTO_EVAL
  names = ("train_transforms", "eval_transforms")
  for field, default in zip(names, defaults, strict=True):
    yield default if fields[field] is None else fields[field]


__all__ = [
  "FACTS",
  "SPLITS",
  "Facts",
  "Files",
  "Missing",
  "Source",
  "build",
  "prepare",
  "train_batches",
]
