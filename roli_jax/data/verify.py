"""Decodes every file once, before training does, and remembers the sound."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Iterable

from roli_jax import progress
from roli_jax.data import decode
from roli_jax.data.source import num_cores
from roli_jax.files import extras

# To be raised when `decode.decode` takes less than before, or more is
# remembered: what older versions remembered is then decoded again.
_RULES = 2

# The sound files that this process has seen: mark and digest, with a space
# between.
_seen: set[str] = set()


def look(
  base: pathlib.Path, names: Iterable[str]
) -> tuple[dict[str, str], dict[str, str]]:
  """Decodes files; returns what is wrong with them, or digests of their bytes.

  A file that was decoded before, and has the size and time of change that it
  had, is not decoded again: a file under $XDG_CACHE_HOME or ~/.cache remembers
  it, if that can be written.

  Args:
    base: where names start.
    names: paths of files, below the root.

  Returns:
    Reasons against those that can not be decoded, by name; and digests of the
    bytes of the others, by name.
  """
  marks = {name: _mark(base / name) for name in names}
  cache = _cache_file(base)
  known = dict(line.rsplit(" ", 1) for line in _seen | _remembered(cache))
  new = [name for name, mark in marks.items() if mark not in known]
  bad = {}
  for name, (reason, digest) in zip(new, _read_all(base, new), strict=True):
    if reason:
      bad[name] = reason
    else:
      known[marks[name]] = digest
  digests = {name: known[m] for name, m in marks.items() if name not in bad}
  if len(bad) < len(new):
    sound = {f"{marks[name]} {digest}" for name, digest in digests.items()}
    _seen.update(sound)
    _remember(cache, sound)
  return bad, digests


def _mark(path: pathlib.Path) -> str:
  """Returns what changes when the file does; "" where there is no file."""
  try:
    found = os.stat(path)
  except OSError:
    return ""
  return f"{os.path.abspath(path)} {found.st_size} {found.st_mtime_ns}"


def _read_all(
  base: pathlib.Path, names: Iterable[str]
) -> list[tuple[str, str]]:
  """Returns what is wrong with each file, "" for nothing; and its digest."""
  paths = [base / name for name in names]
  found = []
  with (
    progress.bar("checking images", len(paths)) as update,
    concurrent.futures.ThreadPoolExecutor(num_cores()) as pool,
    warnings.catch_warnings(),
  ):
    warnings.simplefilter("ignore")  # PIL's, of odd files
    for result in pool.map(_read, paths):
      found.append(result)
      update(1)
  return found


def _read(path: pathlib.Path) -> tuple[str, str]:
  reason = reason_against(path)
  if reason:
    return reason, ""
  with open(path, "rb") as file:  # from memory: it was just decoded
    return "", hashlib.file_digest(file, "sha256").hexdigest()[:32]


def reason_against(path: pathlib.Path) -> str:
  """Says in a few words why a file can't be decoded; "" if it can be."""
  try:
    if not path.is_file():
      return "there is no such file"
    if not path.stat().st_size:
      return "empty"
    decode.decode(path)
  except Exception as error:  # decoders raise whatever the bytes lead them to
    text = str(error).replace(str(path), "").strip() or type(error).__name__
    if text.startswith("cannot identify"):
      return "no image"
    return text.splitlines()[0][:80]
  return ""


def _cache_file(base: pathlib.Path) -> pathlib.Path:
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  place = os.path.abspath(base).encode(errors="surrogateescape")
  name = hashlib.sha256(place).hexdigest()[:16]
  return pathlib.Path(home, "roli_jax", f"images-{name}.json")


def _version() -> str:
  extras.need("PIL")
  import PIL

  return f"{_RULES} {PIL.__version__}"


def _remembered(cache: pathlib.Path) -> set[str]:
  """Reads the sound files of earlier runs; none if the cache can't be read."""
  try:
    kept = json.loads(cache.read_text())
    return set(kept["sound"]) if kept["version"] == _version() else set()
  except (OSError, ValueError, TypeError, KeyError):
    return set()


def _remember(cache: pathlib.Path, sound: Iterable[str]) -> None:
  text = json.dumps({"version": _version(), "sound": sorted(sound)})
  partial = cache.with_name(f"{cache.name}.{os.getpid()}")
  try:
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(text)
    partial.replace(cache)
  except OSError:
    return  # then the next run decodes again
