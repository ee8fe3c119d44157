"""What kind a file is, told from its content: a name may say anything."""

import pathlib
import re
import zipfile

_ANEW = "fetch it anew, and look at its size"
_SOURCE = "get the weights that it was made from"
_UNPACK = "unpack it, and name the file of weights in it"

# How files begin that are something else: what they are, and what to do.
_OTHERS = (
  (rb"\Z", "it is empty", _ANEW),
  (rb"version https://git-lfs", "it is a git-LFS pointer, not the file itself",
   "`git lfs pull` puts the file in its place"),
  (rb"[./]*annex/objects/", "it is a git-annex pointer, not the file itself",
   "`git annex get` puts the file in its place"),
  (rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|script|!--)",
   "it is a web page (HTML), perhaps of a login or a quota",
   "open the address in a browser, and download the file itself"),
  (rb"\x89HDF\r\n\x1a\n", "it is an HDF5 file (.h5), as Keras writes them",
   "read its arrays with h5py"),
  (rb"\x1f\x8b", "it is compressed by gzip", _UNPACK),
  (rb"BZh[1-9]", "it is compressed by bzip2", _UNPACK),
  (rb"\xfd7zXZ\0", "it is compressed by xz", _UNPACK),
  (rb"\x28\xb5\x2f\xfd", "it is compressed by zstd", _UNPACK),
  (rb"7z\xbc\xaf\x27\x1c", "it is a 7z archive", _UNPACK),
  (rb"Rar!\x1a\x07", "it is a RAR archive", _UNPACK),
  (rb"(?s).{257}ustar", "it is a tar archive", _UNPACK),
  (rb"\x93NUMPY", "it is one array without a name (.npy)",
   "numpy.load it, and save all arrays by name with numpy.savez"),
  (rb"[\x02-\x04]\0\0\0\x01\0\0\0", "it is a file of Lua Torch (.t7)",
   "read it with Lua Torch, and save its arrays by name"),
  (rb"GGUF", "it is a GGUF file of quantized weights", _SOURCE),
  (rb"(?s).{4}TFL3", "it is a TensorFlow Lite model", _SOURCE),
  (rb"MATLAB 5", "it is a MATLAB file (.mat)",
   "read its arrays with scipy.io.loadmat"),
  (rb"(?s)[\x81-\x8f][\xa1-\xbf]|\xde..[\xa1-\xbf\xd9]",
   "it is MessagePack (.msgpack), as Flax writes it",
   "read its arrays with flax.serialization.msgpack_restore"),
)  # fmt: skip

# Protobufs have no such beginning: the name tells, or else the first fields.
_ONNX = ("it is an ONNX graph", _SOURCE)
_NAMED = (
  (r"\.onnx", _ONNX),
  (r"\.pb", ("it is a graph of TensorFlow (.pb)", _SOURCE)),
  (r"\.data-\d+-of-\d+|\.index|\.meta",
   ("it is a part of a checkpoint of TensorFlow",
    "read its arrays with tf.train.load_checkpoint")),
)  # fmt: skip

# Names that end so are in zip files that are no checkpoints.
_ZIPPED = (
  (".weights.h5", "it is a model of Keras",
   "load it there, and save its arrays by name with numpy.savez"),
  ("/constants.pkl", "it is a program of TorchScript",
   "torch.jit.load it, and save its state_dict"),
)  # fmt: skip

# What lies in directories that some write in the place of a file.
_DIRECTORIES = (
  (("data.pkl", "*/data.pkl"), "it is an unpacked checkpoint of torch",
   "zip it again, without compression (zip -0)"),
  (("saved_model.pb",), "it is a SavedModel of TensorFlow",
   "load it there, and save its arrays by name with numpy.savez"),
  (("_METADATA", "manifest.ocdbt", "*/_METADATA", "*/manifest.ocdbt",
    "*/*/_METADATA"), "it is a checkpoint of orbax, but of no run of ours",
   "restore it there, and give convert.load its arrays by name"),
)  # fmt: skip


def of(path: pathlib.Path) -> str:
  """Returns the kind of a file: `torch`, `safetensors` or `npz`.

  Args:
    path: the file. Its beginning is read, and a zip file's list of names.

  Raises:
    ValueError: it is something else; the message says what, and what to do.
  """
  if not path.is_file():
    raise ValueError(f"{path} can't be read: it is no file")
  try:
    with path.open("rb") as file:
      head = file.read(512)
  except OSError as error:
    raise ValueError(f"{path} can't be read: {error}") from error
  if head.startswith(b"PK"):
    return _zip(path)
  # The second is the tar format of torch before 0.1.10, by its members.
  old = rb"(?s)(?=(sys_info|pickle|storages|tensors)\0).{257}ustar"
  if re.match(rb"\x80[\x00-\x05]", head) or re.match(old, head):
    return "torch"
  if re.match(rb"(?s).{5}\0{3}\{", head):  # the length of the JSON behind it
    return "safetensors"
  what, todo = _other(head, path.name)
  raise ValueError(f"{path} can't be read: {what}; {todo}")


def _zip(path: pathlib.Path) -> str:
  """Returns the kind of a zip file; torch's reader refuses broken ones."""
  try:
    with zipfile.ZipFile(path) as archive:
      names = archive.namelist()
  except (OSError, ValueError, zipfile.BadZipFile):
    return "torch"
  for member, what, todo in _ZIPPED:
    if any(name.endswith(member) for name in names):
      raise ValueError(f"{path} can't be read: {what}; {todo}")
  return "npz" if all(name.endswith(".npy") for name in names) else "torch"


def _other(head: bytes, name: str) -> tuple[str, str]:
  """Returns what a file is that begins so, and what to do about it."""
  for pattern, what, todo in _OTHERS:
    if re.match(pattern, head):
      return what, todo
  for suffix, what_and_todo in _NAMED:
    if re.search(rf"(?i)({suffix})\Z", name):
      return what_and_todo
  if re.match(rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42]", head):
    return _ONNX
  text = re.match(rb"[\t\r\n -~]{1,40}(?s:.*)", head)
  if text and re.fullmatch(rb"[\t\r\n -~]+", head[:40]):
    first = head[:40].decode().strip().partition("\n")[0]
    return f"it is text, {first!r}", _ANEW
  return f"it is unknown or broken, and begins with {head[:8]!r}", _ANEW


def refuse_directory(path: pathlib.Path) -> None:
  """Raises a ValueError that names what the directory holds, if known.

  Args:
    path: a directory without one file of weights.
  """
  for patterns, what, todo in _DIRECTORIES:
    if any(True for pattern in patterns for _ in path.glob(pattern)):
      raise ValueError(f"{path} can't be read: {what}; {todo}")
  readable = [file.name for file in sorted(path.iterdir()) if _readable(file)]
  if readable:
    raise ValueError(
      f"{path} is a directory: name the file in it that is meant, of"
      f" {', '.join(readable[:4])}"
    )


def _readable(path: pathlib.Path) -> bool:
  """Returns whether the file is of a kind that can be read."""
  try:
    return bool(of(path))
  except ValueError:
    return False
