"""Decodes every file once, before training does, and remembers the sound."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Iterable

from roli_jax import extras, progress
from roli_jax.data import picture
from roli_jax.data.source import num_cores

_RULES = 1  # a number that changes when `picture.decode` takes less than before

_seen: set[str] = set()  # by this process


def bad(base: pathlib.Path, names: Iterable[str]) -> dict[str, str]:
  """The files that can not be decoded, with reasons.

  What was decoded before, of the same size and time of change, is believed:
  by a file under $XDG_CACHE_HOME or ~/.cache, if that can be written.

  Args:
    base: where names start.
    names: of files.
  """
  names = list(names)
  marks = [_mark(base / name) for name in names]
  cache = _cache_file(base)
  known = _seen | _remembered(cache)
  new = [
    (name, mark)
    for name, mark in zip(names, marks, strict=True)
    if mark not in known
  ]
  reasons = _decode_all([base / name for name, _ in new])
  sound = {m for (_, m), reason in zip(new, reasons, strict=True) if not reason}
  _seen.update(sound)
  if sound:
    _remember(cache, (known | sound) & set(marks))
  return {
    name: reason
    for (name, _), reason in zip(new, reasons, strict=True)
    if reason
  }


def _mark(path):
  """What changes when the file does; "" where there is none."""
  try:
    found = os.stat(path)
  except OSError:
    return ""
  return f"{os.path.abspath(path)} {found.st_size} {found.st_mtime_ns}"


def _decode_all(paths):
  """What is wrong with each file, "" for nothing."""
  reasons = []
  with (
    progress.bar("checking images", len(paths)) as update,
    concurrent.futures.ThreadPoolExecutor(num_cores()) as pool,
    warnings.catch_warnings(),
  ):
    warnings.simplefilter("ignore")  # PIL's, of odd files
    for reason in pool.map(reason_against, paths):
      reasons.append(reason)
      update(1)
  return reasons


def reason_against(path: pathlib.Path) -> str:
  """Why a file can not be decoded, a few words; "" if it can be."""
  try:
    if not path.is_file():
      return "there is no such file"
    if not path.stat().st_size:
      return "empty"
    picture.decode(path)
  except Exception as error:  # decoders raise whatever the bytes lead them to
    said = str(error).replace(str(path), "").strip() or type(error).__name__
    if said.startswith("cannot identify"):
      return "no image"
    return said.splitlines()[0][:80]
  return ""


def _cache_file(base):
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  place = os.path.abspath(base).encode(errors="surrogateescape")
  name = hashlib.sha256(place).hexdigest()[:16]
  return pathlib.Path(home, "roli_jax", f"images-{name}.json")


def _version():
  extras.need("PIL")
  import PIL

  return f"{_RULES} {PIL.__version__}"


def _remembered(cache):
  """Marks of files that were sound; none where nothing can be read."""
  try:
    kept = json.loads(cache.read_text())
    return set(kept["sound"]) if kept["version"] == _version() else set()
  except (OSError, ValueError, TypeError, KeyError):
    return set()


def _remember(cache, sound):
  text = json.dumps({"version": _version(), "sound": sorted(sound)})
  partial = cache.with_name(f"{cache.name}.{os.getpid()}")
  try:
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(text)
    partial.replace(cache)
  except OSError:
    return  # then the next run decodes again
