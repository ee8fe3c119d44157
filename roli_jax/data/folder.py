"""Data sets that are files of images, decoded when they are needed."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from roli_jax.data import (
  archives,
  listing,
  picture,
  scan,
  source,
  transforms,
)
from roli_jax.data.facts import FACTS

POLICIES = ("error", "skip")

# Of the data sets that the RoLI reference has splits of: where images lie
# under their root, and their directory in the reference.
NAMED = {
  "caltech256": ("256_ObjectCategories", "Caltech256"),
  "cub": ("images", "CUB"),
  "stanforddogs": ("Images", "StanfordDogs"),
}

_LISTED = 10  # bad files, in a message


@dataclasses.dataclass(frozen=True)
class Files(source.Source):
  """One split, of which paths are in memory and images in files.

  As a `Source`, but `images` are str, [n]: the paths.
  """

  @property
  def shape(self) -> tuple[int, int, int]:
    """Height, width and channels of an image as it is attacked."""
    size = transforms.size(self.eval_transforms, None)
    assert size is not None, "checked when the source was built"
    return (*size, 3)

  @property
  def is_plain(self) -> bool:
    """Never: files have to be decoded."""
    return False

  def picture(self, row: int) -> Any:
    """The image of PIL at this position, before any transform.

    Raises:
      ValueError: a file that is gone, or bad, since it was checked.
    """
    path = self.images[row]
    try:
      return picture.decode(path)
    except Exception as error:  # decoders raise whatever bytes lead them to
      raise ValueError(
        f"{path} was a sound image when the run began, and can't be read now"
        f" ({scan.reason_against(pathlib.Path(path)) or error});"
        " put it back, and the same command goes on"
      ) from error


def build(
  name: str,
  split: str,
  *,
  root: str,
  policy: str,
  train_transforms: transforms.Chain,
  eval_transforms: transforms.Chain,
) -> Files:
  """A split of a data set of image files; see docs/data.md for what must lie.

  Every file of every split is decoded once before, or was in an earlier run.

  Args:
    name: of NAMED or of `archives.ARCHIVES`, or "folder".
    split: `train`, `val` or `test`.
    root: a directory; "" for data/<name>, of a named one.
    policy: "error" refuses bad files, "skip" leaves them out.
    train_transforms: of training images.
    eval_transforms: of all others; all images end with one size.

  Raises:
    ValueError: what must lie there does not; bad files, if the policy is
      "error"; a class without a training image, or a split without images.
  """
  listed = _listed(name, root)
  bad = _bad(listed)
  if bad and policy == "error":
    raise ValueError(_said(bad, len(listed.entries), listed.base))
  good = [entry for entry in listed.entries if entry.name not in bad]
  classes = sorted({entry.label for entry in listed.entries})
  _check_classes(good, classes, listed.base)
  numbers = {label: i for i, label in enumerate(classes)}
  names = sorted({entry.name for entry in listed.entries})
  places = {name: i for i, name in enumerate(names)}
  chosen = [entry for entry in good if entry.split == split]
  left_out = [e for e in listed.entries if e.split == split and e.name in bad]
  return Files(
    images=np.array([str(listed.base / entry.name) for entry in chosen]),
    labels=np.array([numbers[entry.label] for entry in chosen], np.int32),
    # Its place among all names, bad ones too: a repaired file moves no other.
    indices=np.array([places[entry.name] for entry in chosen], np.uint32),
    num_classes=len(classes),
    split=split,
    classes=tuple(str(label) for label in classes),
    train_transforms=train_transforms,
    eval_transforms=eval_transforms,
    skipped=len(left_out),
    notes=_notes(name, split, listed, left_out, chosen, len(classes)),
  )


def _listed(name, root):
  if name in archives.ARCHIVES:
    return archives.read(name, pathlib.Path(root or f"data/{name}"))
  folders = (NAMED[name][0],) if name in NAMED else (".", "images")
  return listing.read(_root(name, root), folders)


def _root(name, root):
  if name == "folder" and not root:
    raise ValueError(
      f"data.name=folder needs data.root=ROOT, with\n{listing.LAYOUTS}"
    )
  at = pathlib.Path(root or f"data/{name}")
  if name not in NAMED:
    if not at.is_dir():
      raise ValueError(
        f"there is no directory {at} (data.root); it must be\n{listing.LAYOUTS}"
      )
    return at
  images, splits = NAMED[name]
  files = [f"{split}.json" for split in source.SPLITS]
  if not ((at / images).is_dir() and all((at / f).is_file() for f in files)):
    raise ValueError(
      f"{name} is not at {at}, or not all of it. There must be\n"
      f"  {at}/{images}/   the images, from the data set's home page\n"
      f"  {at}/{{train,val,test}}.json   the splits, from data_splits/{splits}/"
      " of github.com/DongXzz/RoLI\n"
      "--config.data.root=DIR if it lies elsewhere; more in docs/data.md."
    )
  return at


def _bad(listed):
  names = dict.fromkeys(
    entry.name for entry in listed.entries if entry.name not in listed.wrong
  )
  return listed.wrong | scan.bad(listed.base, names)


def _said(bad, count, base):
  """A message of six lines at most, which main.py prints in full."""
  first = [f"{name}: {reason}" for name, reason in sorted(bad.items())]
  first = first[:_LISTED]
  pairs = ["; ".join(first[i : i + 2]) for i in range(0, len(first), 2)]
  return "\n  ".join(
    [
      f"{len(bad)} of {count} files in {base} can't be used; repair or remove"
      " them, or leave them out by --config.data.policy=skip:",
      *pairs,
    ]
  )


def _check_classes(good, classes, base):
  splits = {entry.split for entry in good}
  for split in source.SPLITS:
    if split not in splits:
      raise ValueError(f"{base}: there are no images for {split}")
  trained = {entry.label for entry in good if entry.split == "train"}
  lacking = [str(label) for label in classes if label not in trained]
  if lacking:
    raise ValueError(
      f"{base}: {len(lacking)} of {len(classes)} classes have no training"
      f" image that can be used: {', '.join(lacking[:10])}"
    )


def _notes(name, split, listed, left_out, chosen, num_classes):
  notes = []
  if left_out:
    names = ", ".join(entry.name for entry in left_out[:3])
    more = ", ..." if len(left_out) > 3 else ""
    notes.append(f"{len(left_out)} bad files left out ({names}{more})")
  if listed.ignored:
    notes.append(f"{listed.ignored} files without an image's suffix ignored")
  if listed.stray:
    notes.append(f"{listed.stray} images outside classes' directories ignored")
  facts = FACTS.get(name)
  if facts:
    expected = (facts.num_classes, getattr(facts, split))
    found = (num_classes, len(chosen))
    if found != expected:
      notes.append(
        f"{name} {split} should have {expected[0]} classes and {expected[1]}"
        f" images, here are {found[0]} and {found[1]}"
      )
  return tuple(notes)
