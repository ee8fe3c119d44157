"""PyTorch's checkpoints, read and written without PyTorch."""

import io
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from roli_jax.files.pickles import AGAIN, STORAGES, Refused, check_size, run

_MAGIC = 0x1950A86A20F9469CFC6C


def read(path: str | pathlib.Path) -> Any:
  """Returns the object in a file of `torch.save`, tensors as read-only arrays.

  Tensors that shared memory still share it. Parameters become arrays too, a
  tensor's requires_grad and hooks are dropped, objects that hold settings
  (`argparse.Namespace`) become dicts, and a dtype its name.

  Raises:
    ValueError: there is no such file; it is broken or no checkpoint; it names
      something that no weights need.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"{path} is no file")
  try:
    with path.open("rb") as file:
      return _reader(file)(file)
  except Refused as error:
    raise ValueError(f"{path} {error}") from error
  except Exception as error:  # bytes at random can raise anything
    raise ValueError(
      f"{path} is truncated or not a torch checkpoint; get it anew"
      f" ({type(error).__name__}: {error!s:.80})"
    ) from error


def write(path: str | pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes a state dict that `torch.load` reads.

  While it is written, readers find the old file.

  Args:
    path: the file to write.
    arrays: the state dict, of dtypes that torch has.

  Raises:
    ValueError: torch has no such dtype.
  """
  path = pathlib.Path(path)
  for name, array in arrays.items():
    if array.dtype.name not in STORAGES.values():
      raise ValueError(
        f"{path} can't hold {name!r}, whose dtype is {array.dtype}; dtypes are"
        f" {', '.join(STORAGES.values())}"
      )
  partial = path.with_name(path.name + ".partial")
  with zipfile.ZipFile(partial, "w") as archive:

    def put(name: str, data: bytes | memoryview) -> None:
      # A ZipInfo has no date, so that the same arrays make the same file.
      archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)

    put("data.pkl", _pickled(arrays))
    put("byteorder", b"little")
    for i, array in enumerate(arrays.values()):
      native = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
      put(f"data/{i}", native.reshape(-1).view(np.uint8).data)
    put("version", b"3\n")
  partial.replace(path)


def _pickled(arrays: Mapping[str, np.ndarray]) -> bytes:
  """Returns the pickle of an OrderedDict of tensors, as torch.save writes it.

  It names classes of torch, so that `pickle` could write it only with torch.
  """
  classes = {name: storage for storage, name in STORAGES.items()}

  def value(x: Any) -> bytes:
    return pickle.dumps(x, protocol=2)[2:-1]  # less its PROTO and STOP

  def name(dotted: str) -> bytes:
    return "c{}\n{}\n".format(*dotted.rsplit(".", 1)).encode()

  empty = name("collections.OrderedDict") + b")R"
  parts = [b"\x80\x02", empty, b"("]
  for i, (key, array) in enumerate(arrays.items()):
    storage = [value("storage"), name(classes[array.dtype.name])]
    storage += [value(str(i)), value("cpu"), value(array.size)]
    strides = np.empty_like(array, order="C").strides
    parts += [value(key), name("torch._utils._rebuild_tensor_v2"), b"(("]
    parts += [*storage, b"tQ", value(0), value(array.shape)]
    parts += [value(tuple(s // array.itemsize for s in strides))]
    parts += [value(False), empty, b"tR"]
  return b"".join([*parts, b"u."])


# Files: the zip of torch 1.6 on, and the row of pickles before it.


def _reader(file: io.BufferedReader) -> Callable[[io.BufferedReader], Any]:
  """Returns the reader of a file's format, which its beginning shows."""
  head = file.read(262)
  file.seek(0)
  if head[8:9] == b"{":
    raise Refused("is a safetensors file; name it .safetensors")
  if head[257:] == b"ustar":
    raise Refused(f"is in the tar format of torch before 0.1.10; {AGAIN}")
  if head.startswith(b"PK"):
    return _read_zip
  if head.startswith(b"\x80"):
    return _read_legacy
  raise Refused(
    f"is truncated or not a torch checkpoint: it begins with {head[:8]!r}"
  )


def _read_zip(file: io.BufferedReader) -> Any:
  with zipfile.ZipFile(file) as archive:
    members = {info.filename: info for info in archive.infolist()}
    # Refused, so that a small file can't grow into a large one in memory.
    if any(info.compress_type for info in members.values()):
      raise Refused(f"is compressed, which torch.save never does; {AGAIN}")
    if sum(info.file_size for info in members.values()) > _size(file):
      raise Refused("is truncated: its parts are larger than the file")
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
      raise Refused(
        f"is a zip file that holds {len(pickles)} of torch's data.pkl, not one"
      )
    root = pickles[0].removesuffix("data.pkl")
    order = f"{root}byteorder"
    if order in members and archive.read(order) != b"little":
      raise Refused(f"is of a big-endian machine; there, {AGAIN}")
    storages: dict[str, np.ndarray] = {}

    def storage(key: str, count: int, itemsize: int) -> np.ndarray:
      if key not in storages:
        data = archive.read(f"{root}data/{key}")
        storages[key] = np.frombuffer(data, np.uint8)
      check_size(key, storages[key].size, count * itemsize)
      return storages[key]

    return run(archive.read(pickles[0]), storage)


def _read_legacy(file: io.BufferedReader) -> Any:
  storages: dict[str, np.ndarray] = {}
  counts: dict[str, int] = {}
  left = _size(file)

  def storage(key: str, count: int, itemsize: int) -> np.ndarray:
    # The bytes come after the pickle, so a tensor is made over empty memory.
    nonlocal left
    if key not in storages:
      left -= count * itemsize
      if count < 0 or left < 0:
        raise Refused("is truncated: its tensors are larger than the file")
      storages[key] = np.empty(count * itemsize, np.uint8)
      counts[key] = count
    check_size(key, storages[key].size, count * itemsize)
    return storages[key]

  magic = run(file, storage)
  if not isinstance(magic, int) or magic != _MAGIC:
    raise Refused("is a pickle, but not of torch.save; save its arrays anew")
  run(file, storage)  # the version, of which there was one
  if run(file, storage)["little_endian"] is not True:
    raise Refused(f"is of a big-endian machine; there, {AGAIN}")
  result = run(file, storage)
  keys = run(file, storage)
  if set(map(str, keys)) != storages.keys():
    raise Refused("has tensors without a storage, or a storage without any")
  for key in keys:
    count = int.from_bytes(file.read(8), "little")
    data = storages[key].data
    if count != counts[key] or file.readinto(data) != len(data):
      raise Refused(f"is truncated, or broken at storage {key!r}")
  return result


def _size(file: io.BufferedReader) -> int:
  """Returns the size of a file in bytes."""
  return os.fstat(file.fileno()).st_size
