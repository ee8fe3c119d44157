"""Data sets that are files of images, decoded when they are needed."""

import dataclasses
import functools
import pathlib
from collections.abc import Container, Iterator, Mapping, Sequence

import numpy as np

from roli_jax.data import (
  archives,
  copies,
  decode,
  homes,
  listing,
  source,
  transforms,
  verify,
  walk,
)
from roli_jax.data.sizes import FACTS
from roli_jax.data.source import SPLITS

POLICIES = ("error", "skip")

# The data sets that the RoLI reference has splits of, and where their images
# lie under their root.
NAMED = {
  "caltech256": "256_ObjectCategories",
  "cub": "images",
  "stanforddogs": "Images",
}

_LISTED = 10  # bad files, in a message


@dataclasses.dataclass(frozen=True)
class Files(source.Source):
  """One split, of which paths are in memory and images in files.

  A `Source` whose `images` are the files' paths, str [n].
  """

  @functools.cached_property  # the chain is run to see it
  def shape(self) -> tuple[int, int, int]:
    """Height, width and channels of an image as it is attacked."""
    size = transforms.size(self.eval_transforms, None)
    assert size is not None, "checked when the source was built"
    return (*size, 3)

  @property
  def is_plain(self) -> bool:
    """Never: files have to be decoded."""
    return False

  def picture(self, row: int) -> decode.Picture:
    """Decodes the image at this position, before any transform.

    Raises:
      ValueError: a file that is gone, or bad, since it was checked.
    """
    path = self.images[row]
    try:
      return decode.decode(path)
    except Exception as error:  # decoders raise whatever bytes lead them to
      raise ValueError(
        f"{path} was a sound image when the run began, and can't be read now"
        f" ({verify.reason_against(pathlib.Path(path)) or error});"
        " put it back, and the same command goes on"
      ) from error


def build(
  name: str, split: str, root: str, policy: str, layout: str = ""
) -> Files:
  """Finds and checks the files of a split; docs/data.md says what must lie.

  Every file of every split is decoded once before, or was in an earlier run.

  Args:
    name: a name in NAMED or in `archives.ARCHIVES`, or "folder".
    split: `train`, `val` or `test`.
    root: a directory; "" for data/<name>, except for "folder".
    policy: "error" refuses bad files, and a test that training has seen; "skip"
      leaves bad files out, and of copies all but those in the last split.
    layout: for "folder", what the directories at its root are; see
      `listing.read`.

  Raises:
    ValueError: what must lie there does not; bad files, if the policy is
      "error"; a class without a training image, or a split without images.
  """
  listed = find(name, root, layout)
  entries = listed.entries
  bad, groups = _check_files(listed)
  if bad and policy == "error":
    raise ValueError(_refusal(bad, len(entries), listed.base))
  shared = copies.across(groups, bad)
  copied: set[str] = set()
  if name not in archives.ARCHIVES:  # the Guide's splits are as it drew them
    if policy == "error":
      tested = sum(entry.split == "test" for entry in entries)
      copies.check(shared, tested, listed.base)
    else:
      copied = copies.before_last(shared)
  classes = sorted({entry.label for entry in entries})
  good = entries
  for without, after in ((bad, ""), (copied, ", copies being left out")):
    good = tuple(entry for entry in good if entry.name not in without)
    _check_classes(good, classes, listed.base, after)
  numbers = {label: i for i, label in enumerate(classes)}
  names = sorted({entry.name for entry in entries})
  places = {name: i for i, name in enumerate(names)}
  chosen = [entry for entry in good if entry.split == split]
  mentioned = [entry.name for entry in entries if entry.split == split]
  notes = (
    *_left_out("bad files", mentioned, bad),
    *_left_out("copies of others", mentioned, copied),
    *(listed.passed_over if split == SPLITS[0] else ()),  # once is enough
    *listed.notes,
    *copies.notes(shared),
    *_unusual(name, split, chosen, classes),
  )
  return Files(
    images=np.array([str(listed.base / entry.name) for entry in chosen]),
    labels=np.array([numbers[entry.label] for entry in chosen], np.int32),
    # Its place among all names, bad ones too: a repaired file moves no other.
    indices=np.array([places[entry.name] for entry in chosen], np.uint32),
    num_classes=len(classes),
    split=split,
    classes=tuple(str(label) for label in classes),
    skipped=len(mentioned) - len(chosen),
    notes=notes,
  )


def find(name: str, root: str, layout: str = "") -> listing.Listing:
  """Lists the files of a data set; reads none of them.

  Args:
    name: as for `build`, and the others too.
    root: a directory; "" for data/<name>, except for "folder".
    layout: as for `build`.

  Raises:
    Missing: what must lie there does not.
    ValueError: something else does.
  """
  if name == "folder" and not root:
    raise ValueError(
      f"data.name=folder needs data.root=ROOT, with\n{listing.LAYOUTS}"
    )
  base = pathlib.Path(root or f"data/{name}").expanduser()
  if name in archives.ARCHIVES:
    return archives.read(name, base)
  if name not in NAMED:
    if not base.is_dir():
      raise ValueError(
        f"there is no directory {base} (data.root); it must"
        f" be\n{listing.LAYOUTS}"
      )
    return listing.read(base, (".", "images"), layout)
  images = NAMED[name]
  is_there = (base / images).is_dir()
  if not (is_there and listing.jsons(base).keys() == set(SPLITS)):
    raise source.Missing(
      f"{name} is not at {base}, or not all of it. To fetch it:\n"
      f"  {homes.prepare_command(name, root)}\n"
      f"There must be {base}/{images}/, the images, and\n"
      f"  {base}/{{train,val,test}}.json, the splits: data_splits/{name}/ of"
      " github.com/DongXzz/RoLI.\n"
      "--config.data.root=DIR if it lies elsewhere; more in docs/data.md."
    )
  return listing.read(base, (images,), layout)


def _check_files(
  listed: listing.Listing,
) -> tuple[dict[str, str], list[copies.Group]]:
  """Returns what is wrong with files, by name; and groups of equal bytes."""
  names = dict.fromkeys(
    entry.name for entry in listed.entries if entry.name not in listed.wrong
  )
  unsound, digests = verify.look(listed.base, names)
  groups = copies.shared(listed.entries, digests)
  links = copies.one_file(groups, listed.base)
  return {**listed.wrong, **unsound, **links}, groups


def _refusal(bad: Mapping[str, str], count: int, base: pathlib.Path) -> str:
  """Writes a message of six lines at most, which main.py prints in full."""
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


def _check_classes(
  good: Sequence[listing.Entry],
  classes: Sequence[str | int],
  base: pathlib.Path,
  after: str,
) -> None:
  """Raises a ValueError for a split, or a class in training, without images."""
  if len(classes) < 2:
    raise ValueError(f"{base} has one class, {classes[0]}, and two are needed")
  splits = {entry.split for entry in good}
  for split in SPLITS:
    if split not in splits:
      raise ValueError(f"{base}: there are no images for {split}{after}")
  lacking = _lacking(classes, [e for e in good if e.split == "train"])
  if lacking:
    raise ValueError(
      f"{base}: {len(lacking)} of {len(classes)} classes have no training"
      f" image that can be used: {', '.join(lacking[:10])}{after}"
    )


def _lacking(
  classes: Sequence[str | int], entries: Sequence[listing.Entry]
) -> list[str]:
  """Lists the classes of which there is no entry."""
  held = {entry.label for entry in entries}
  return [str(label) for label in classes if label not in held]


def _left_out(
  what: str, names: Sequence[str], left: Container[str]
) -> Iterator[str]:
  names = [name for name in names if name in left]
  if names:
    yield f"{len(names)} {what} left out ({walk.some(names)})"


def _unusual(
  name: str,
  split: str,
  chosen: Sequence[listing.Entry],
  classes: Sequence[str | int],
) -> Iterator[str]:
  """Yields a line for classes without images, and for sizes unlike FACTS."""
  lacking = _lacking(classes, chosen)
  if lacking:
    yield (
      f"{len(lacking)} of {len(classes)} classes have no {split} image"
      f" ({walk.some(lacking)})"
    )
  facts = FACTS.get(name)
  if not facts:
    return
  expected = (facts.num_classes, getattr(facts, split))
  if (len(classes), len(chosen)) != expected:
    yield (
      f"{name} {split} should have {expected[0]} classes and {expected[1]}"
      f" images, here are {len(classes)} and {len(chosen)}"
    )
