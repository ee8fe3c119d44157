"""Data sets by name."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from roli_jax import specs
from roli_jax.data import archives, folder, glyphs, listing, tfds, transforms
from roli_jax.data.pipeline import train_batches
from roli_jax.data.sizes import FACTS, Facts
from roli_jax.data.source import SPLITS, Source

# (split, root) -> source
IN_MEMORY: dict[str, Callable[[str, str], Source]] = {
  "cifar10": functools.partial(tfds.cifar, "cifar10"),
  "cifar100": functools.partial(tfds.cifar, "cifar100"),
  "digits": lambda split, root: glyphs.digits(split),
  "letters": lambda split, root: glyphs.letters(split),
}
IN_FILES = ("folder", *folder.NAMED, *archives.ARCHIVES)

_FIELDS: dict[str, Any] = {
  "train_size": 0,  # for `Source.subset`
  "root": "",
  "policy": "error",
  "layout": "",
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
      there (the message has what must lie where); bad files, if `policy` is
      "error".
  """
  if split not in SPLITS:
    raise ValueError(f"unknown split {split!r}; there are {SPLITS}")
  fields = _checked({"name": spec} if isinstance(spec, str) else spec)
  name = fields["name"]
  train, held = (transforms.build(texts) for texts in _texts(fields))
  if name in IN_FILES:
    transforms.check(train, held, None, channels=3)
    source: Source = folder.build(
      name, split, fields["root"], fields["policy"], fields["layout"]
    )
  else:
    height, width, channels = FACTS[name].shape
    transforms.check(train, held, (height, width), channels)
    source = IN_MEMORY[name](split, fields["root"])
  return dataclasses.replace(
    source, split=split, train_transforms=train, eval_transforms=held
  )


def _checked(spec: Mapping[str, Any]) -> dict[str, Any]:
  """Returns all fields; raises a ValueError for unknown or wrong ones."""
  for field in spec:
    if field != "name":
      specs.lookup(_FIELDS, field, "field of data")
  fields = {**_FIELDS, **spec}
  known = dict.fromkeys((*IN_MEMORY, *IN_FILES))
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
  "Source",
  "build",
  "train_batches",
]
