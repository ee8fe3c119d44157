"""Data sets of Hugging Face's hub, brought into files by the library datasets.

A name is `hf:OWNER/NAME`, or `hf:OWNER/NAME:key=value,...` with keys

  config, revision   which of its configurations, which commit or branch
  image, label       the columns, where there is more than one of a kind

`fetch` writes them as a folder, `{train,val,test}/CLASS/NUMBER.png`, with the
bytes of the images as they were; from then on it is a data set like `folder`.
CIFAR stays parquet, and is read as CIFAR.
"""

import io
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from roli_jax import progress, specs
from roli_jax.data import decode, download, homes, walk
from roli_jax.data.source import Missing
from roli_jax.files import extras

PREFIX = "hf:"
_KEYS = dict.fromkeys(("config", "revision", "image", "label"))
_CIFAR = {"uoft-cs/cifar10": "cifar10", "uoft-cs/cifar100": "cifar100"}


def resolve(name: str, root: str) -> tuple[str, str]:
  """Returns what a data set of the hub is read as, and from where.

  Args:
    name: `hf:OWNER/NAME`, perhaps with keys.
    root: where it was brought to; "" for data/hf/OWNER/NAME.

  Returns:
    "folder", "cifar10" or "cifar100", and the root of that.

  Raises:
    Missing: it was not brought there; the message has the command that does.
    ValueError: a name of another form.
  """
  kind, place = _kind(*_parse(name)), _place(name, root)
  if not place.is_dir():
    raise Missing(
      f"{name} is not at {place}. To fetch it:\n"
      f"  {homes.prepare_command(name, root)}\n"
      "--config.data.root=DIR if it lies elsewhere; more in docs/data.md."
    )
  return kind, str(place)


def _parse(name: str) -> tuple[str, dict[str, str]]:
  """Returns OWNER/NAME and what else a name says, by key."""
  repo, _, rest = name.removeprefix(PREFIX).partition(":")
  if not re.fullmatch(r"[\w.-]*\w[\w.-]*/[\w.-]*\w[\w.-]*", repo):
    raise ValueError(f"expected hf:OWNER/NAME[:key=value,...], got {name!r}")
  given = {}
  for pair in filter(None, rest.split(",")):
    key, _, value = pair.partition("=")
    specs.lookup(_KEYS, key, f"key of {PREFIX}{repo}")
    given[key] = value
  return repo, given


def _kind(repo: str, given: Mapping[str, str]) -> str:
  is_original = not given.keys() & {"image", "label"}
  return _CIFAR.get(repo, "folder") if is_original else "folder"


def _place(name: str, root: str) -> pathlib.Path:
  if root:
    return pathlib.Path(root).expanduser()
  return pathlib.Path("data", "hf", name.removeprefix(PREFIX))


def fetch(name: str, root: str) -> Iterator[str]:
  """Downloads a data set and writes it as files: all of it, or nothing.

  A directory OWNER/NAME in the working directory is taken for the data set, as
  the library does. What that downloads it keeps, in $HF_HOME.

  Args:
    name: as for `resolve`.
    root: likewise.

  Yields:
    What it is about to do, a line each.

  Raises:
    ValueError: it can't be had, or has no images with classes, or more than
      one column of these and the name says none.
  """
  extras.need("datasets", "PIL")
  import datasets

  repo, given = _parse(name)
  place = _place(name, root)
  with download.alone(place.parent):
    if place.is_dir():  # another process was faster
      return
    yield f"fetching {repo} from huggingface.co"
    try:
      found = datasets.load_dataset(
        repo, given.get("config"), revision=given.get("revision")
      )
    except Exception as error:  # of many types, by what goes wrong where
      first = (str(error).strip() or type(error).__name__).splitlines()[0]
      raise ValueError(
        f"{repo} can't be had from huggingface.co: {first:.300}"
      ) from error
    try:
      with download.beside(place) as folder:
        yield from _write_all(found, folder, name)
        folder.replace(place)
    except OSError as error:
      raise ValueError(f"{place} can't be written: {error}") from error


def _write_all(
  found: Mapping[str, Any], folder: pathlib.Path, name: str
) -> Iterator[str]:
  """Writes all splits; a single one lies as classes, which `folder` splits."""
  repo, given = _parse(name)
  for split, rows in found.items():
    inner = walk.SPLIT_NAMES.get(split.lower()) if len(found) > 1 else "."
    if inner is None:
      yield f"leaving out {split}, which is no split by its name"
      continue
    yield f"writing {len(rows):,} images of {split}"
    if _kind(repo, given) == "folder":
      yield from _write(rows, given, folder / inner, name)
    else:
      rows.to_parquet(str(folder / f"{split}.parquet"))


def _write(
  rows: Any, given: Mapping[str, str], folder: pathlib.Path, name: str
) -> Iterator[str]:
  """Writes the images of a split in directories of classes.

  Yields:
    How many are left out for want of a label, if any are.
  """
  import datasets

  features = rows.features
  image = _column(features, datasets.Image, "image", given, name)
  label = _column(features, datasets.ClassLabel, "label", given, name)
  if isinstance(features[label], datasets.ClassLabel):
    classes: Sequence[Any] = range(features[label].num_classes)
    folders = _folders(features[label].names)
  else:
    classes = sorted({x for x in rows[label] if x is not None})
    folders = _folders([str(x) for x in classes])
  by_class = dict(zip(classes, folders, strict=True))
  for inner in folders:
    (folder / inner).mkdir(parents=True, exist_ok=True)
  encoded = rows.select_columns([image, label]).cast_column(
    image, datasets.Image(decode=False)
  )
  width, left = len(str(len(rows))), 0
  with progress.bar("writing images", len(rows)) as update:
    for number, row in enumerate(encoded):
      update(1)
      if row[label] not in by_class:  # -1 and None are unlabelled
        left += 1
        continue
      path = row[image]["path"] or ""
      content = row[image]["bytes"] or pathlib.Path(path).read_bytes()
      file = f"{number:0{width}d}{_suffix(path, content)}"
      (folder / by_class[row[label]] / file).write_bytes(content)
  if left:
    yield f"leaving out {left:,} images without a label"


def _column(
  features: Mapping[str, Any],
  kind: type,
  what: str,
  given: Mapping[str, str],
  name: str,
) -> str:
  """Returns the column that the name says, or the only one of its kind."""
  if what in given:
    specs.lookup(dict(features), given[what], f"column of {name}")
    return given[what]
  found = [key for key, feature in features.items() if type(feature) is kind]
  if len(found) != 1:
    joint = "," if given else ":"
    raise ValueError(
      f"{name} has {len(found)} columns of {kind.__name__}; its columns are"
      f" {', '.join(features)}.\n"
      f"Say which: '--config.data.name={name}{joint}{what}=COLUMN'"
    )
  return found[0]


def _folders(names: Sequence[str]) -> list[str]:
  """Makes directories' names of classes, whose order is that of the labels."""
  clean = [re.sub(r"[/\\\0]", "_", name).strip(". ") or "_" for name in names]
  in_order = clean == sorted(set(clean))
  if in_order and not {name.lower() for name in clean} & {*walk.SPLIT_NAMES}:
    return clean
  width = len(str(len(names) - 1))
  return [f"{i:0{width}d}.{name}" for i, name in enumerate(clean)]


def _suffix(path: str, content: bytes) -> str:
  """Returns the suffix of an image's file, by its name or its content."""
  from PIL import Image

  suffix = os.path.splitext(path)[1].lower()
  if suffix in decode.SUFFIXES:
    return suffix
  try:
    with Image.open(io.BytesIO(content)) as image:
      kind = (image.format or "png").lower()
  except OSError:
    kind = "png"  # whoever reads it is told what is wrong with it
  return ".jpg" if kind == "mpo" else f".{kind}"  # MPO is a JPEG with more
