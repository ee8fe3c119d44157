"""Brings files from the web: whole, checked, and going on where it stopped."""

import contextlib
import errno
import fcntl
import hashlib
import http.client
import pathlib
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator

from roli_jax import progress

# Seconds before each further try, where the connection breaks.
_WAITS = (1.0, 2.0, 4.0)
_TIMEOUT = 60.0  # seconds without a byte
_CHUNK = 2**20  # bytes, of which the progress bar counts
_BROKEN = (
  tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError,
)  # fmt: skip


@contextlib.contextmanager
def alone(root: pathlib.Path) -> Iterator[None]:
  """Makes a directory; other processes that want it too wait until it is free.

  Args:
    root: the directory of a data set.

  Raises:
    ValueError: it can't be made or written to.
  """
  with contextlib.ExitStack() as stack:
    try:
      root.mkdir(parents=True, exist_ok=True)
      file = stack.enter_context(open(root / ".lock", "w"))
    except OSError as error:
      raise ValueError(f"{root} can't be written to: {error}") from error
    fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
    yield


@contextlib.contextmanager
def beside(place: pathlib.Path) -> Iterator[pathlib.Path]:
  """Makes a directory beside a place, and removes what is left in it.

  What is whole is moved from there to its place.

  Args:
    place: the path of a file or directory, in a directory that is there.
  """
  folder = place.with_name(f".{place.name}.part")
  shutil.rmtree(folder, ignore_errors=True)
  try:
    folder.mkdir()
    yield folder
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def fetch(
  url: str, digest: str, place: pathlib.Path, size: int | None = None
) -> None:
  """Downloads a file, unless it is there.

  What has come lies beside the place as `NAME.part`, and the next call asks for
  the rest. A server that can't send parts sends it all again.

  Args:
    url: where the file comes from.
    digest: its MD5 or SHA-256, in hex, or the beginning of a SHA-256; "": not
      known. What is there already is not checked.
    place: the path that it gets, in a directory that is there.
    size: in bytes; None: not known.

  Raises:
    ValueError: it is not there, or another file by its digest or size (what
      came is then removed); no connection, or one that breaks again and again;
      no space. The message says what to do.
  """
  if place.exists():
    return
  part = place.with_name(f"{place.name}.part")
  # Killed before it was moved: a server has nothing more to send then.
  whole = digest and part.exists() and not _wrong(part, digest, size)
  if not whole:
    _receive(url, part, place)
    if wrong := _wrong(part, digest, size):
      part.unlink()
      raise ValueError(
        f"{url} came with {wrong}:\n"
        "  it was damaged on its way, or is another file by now. It is removed;"
        " the same command\n"
        f"  tries again, or put the right file at {place}."
      )
  part.replace(place)


def _wrong(file: pathlib.Path, digest: str, size: int | None) -> str:
  """Returns what tells that it is another file, "" if nothing does."""
  found = file.stat().st_size
  if size not in (None, found):
    return f"{found:,} bytes, not {size:,}"
  checksum = _digest(file, digest) if digest else ""
  if not checksum.startswith(digest):
    return f"the checksum {checksum}, not {digest}"
  return ""


def _digest(file: pathlib.Path, like: str) -> str:
  """Returns a file's digest, MD5 or SHA-256 by the length of another."""
  with open(file, "rb") as content:
    name = "md5" if len(like) == 32 else "sha256"
    return hashlib.file_digest(content, name).hexdigest()


def _receive(url: str, part: pathlib.Path, place: pathlib.Path) -> None:
  """Downloads what a part lacks, trying again where the connection breaks."""
  by_hand = f"get it otherwise, and put it at {place}"
  for wait in (*_WAITS, None):
    try:
      return _append(url, part)
    except urllib.error.HTTPError as error:
      if error.code == 416 and part.exists():  # it is longer than the file
        part.unlink()
      elif error.code < 500 or wait is None:
        raise ValueError(
          f"{url}: the server says {error.code} {error.reason}; {by_hand}"
        ) from error
    except (OSError, http.client.HTTPException) as error:
      if getattr(error, "errno", None) == errno.ENOSPC:
        raise ValueError(
          f"{part.parent} is full: {error}; make room, and the same command"
          " goes on"
        ) from error
      if wait is None:
        reason = getattr(error, "reason", None) or error
        raise ValueError(
          f"{url} can't be had: {reason}. With a connection the same command"
          f" goes on; or {by_hand}"
        ) from error
    time.sleep(wait or 0)


def _append(url: str, part: pathlib.Path) -> None:
  """Asks once for what a part lacks; raises an OSError if it doesn't come."""
  start = part.stat().st_size if part.exists() else 0
  request = urllib.request.Request(url, headers={"User-Agent": "roli_jax"})
  if start:
    request.add_header("Range", f"bytes={start}-")
  with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
      start = 0
    size = start + int(response.headers.get("Content-Length") or 0)
    free = shutil.disk_usage(part.parent).free
    if size - start > free:
      raise OSError(
        errno.ENOSPC, f"{_mb(size - start)} to come, {_mb(free)} free"
      )
    label = f"{part.name.removesuffix('.part')}, MiB"
    with (
      open(part, "ab" if start else "wb") as file,
      progress.bar(label, -(-size // _CHUNK), start // _CHUNK) as update,
    ):
      while chunk := response.read(_CHUNK):
        file.write(chunk)
        update(1)
  if part.stat().st_size < size:
    raise ConnectionError(f"it broke off after {_mb(part.stat().st_size)}")


def _mb(size: int) -> str:
  return f"{size / 1e6:,.0f} MB"


def unpack(archive: pathlib.Path, inside: str, place: pathlib.Path) -> None:
  """Unpacks one directory, or file, of an archive: whole, or not at all.

  Args:
    archive: a .tar, .tar.gz or .zip. No member of it lands outside.
    inside: the path in it that is wanted.
    place: the path that it gets.

  Raises:
    ValueError: the archive is broken, lacks it or leads outside; no space.
  """
  try:
    with beside(place) as folder:
      if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
          zipped.extractall(folder)
      else:
        with tarfile.open(archive) as taped:
          taped.extractall(folder, filter="data")
      (folder / inside).replace(place)
  except _BROKEN as error:
    raise ValueError(
      f"{archive} can't be unpacked: {error}; make room if the disk is full,"
      " else remove it, and the same command fetches it anew"
    ) from error
