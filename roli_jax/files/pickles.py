"""Pickles of arrays, PyTorch's first, read by a machine of our own.

A pickle is a program: it may call whatever it names. So none is ever given to
`pickle`. `run` follows the instructions that `torch.save` writes, and calls
only what `_CALLS` lists; it refuses a file that names anything else before it
reads on.
"""

import collections
import dataclasses
import io
import pickletools
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np

T = TypeVar("T")
Load = Callable[[str, int, int], np.ndarray]

STORAGES = {
  "torch.BFloat16Storage": "bfloat16",
  "torch.BoolStorage": "bool",
  "torch.ByteStorage": "uint8",
  "torch.CharStorage": "int8",
  "torch.ComplexDoubleStorage": "complex128",
  "torch.ComplexFloatStorage": "complex64",
  "torch.DoubleStorage": "float64",
  "torch.FloatStorage": "float32",
  "torch.HalfStorage": "float16",
  "torch.IntStorage": "int32",
  "torch.LongStorage": "int64",
  "torch.ShortStorage": "int16",
}

# Dtypes without a class of storages: their tensors have bare bytes.
_LATER = (
  "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
  "uint16", "uint32", "uint64",
)  # fmt: skip

_DTYPES = {
  f"torch.{name}": jnp.dtype(name) for name in (*STORAGES.values(), *_LATER)
}

_READABLE = {"torch.storage.UntypedStorage": "uint8"} | STORAGES

AGAIN = "load it with torch and save its state_dict anew"


class Refused(ValueError):
  """The reason why a file isn't read; callers put its path before it."""


class _Name(str):
  """The name of a class or function: compared, and never imported."""


class _Code:
  """Stands for code that a pickle holds: it is not kept, and never made."""


@dataclasses.dataclass(frozen=True)
class _Storage:
  """The memory of tensors: bytes, and the dtype of the values in them."""

  data: np.ndarray
  dtype: np.dtype


def check_size(key: str, size: int, expected: int) -> None:
  """Refuses a storage of another number of bytes than expected."""
  if size != expected:
    raise Refused(
      f"has {size} bytes in storage {key!r}, whose tensors need {expected}"
    )


# Pickles: a stack of values, and instructions that take from it and put.

_NEW: dict[str, Callable[[], Any]] = {
  "NONE": lambda: None,
  "NEWTRUE": lambda: True,
  "NEWFALSE": lambda: False,
  "EMPTY_TUPLE": tuple,
  "EMPTY_LIST": list,
  "EMPTY_SET": set,
  "EMPTY_DICT": dict,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def run(instructions: bytes | io.BufferedReader, storage: Load) -> Any:
  """Returns the value of one pickle.

  Args:
    instructions: bytes, or a file, which is read up to the pickle's end.
    storage: returns a storage's bytes, from its key, its number of values and
      the size of a value in bytes.

  Raises:
    Refused: it names what no weights need, or is broken. Bytes at random can
      raise any other error.
  """
  stack: list[Any] = []
  marks: list[int] = []
  memo: dict[int, Any] = {}
  arg: Any

  def take(start: int) -> list[Any]:
    if not 0 <= start <= len(stack):
      raise Refused("is broken: its pickle takes what it never put")
    items = stack[start:]
    del stack[start:]
    return items

  for instruction, arg, _ in pickletools.genops(instructions):
    match instruction.name:
      case "PROTO" | "FRAME" | "STOP":
        pass
      case name if name in _NEW:
        stack.append(_NEW[name]())
      case "MARK":
        marks.append(len(stack))
      case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE" as name:
        memo[len(memo) if name == "MEMOIZE" else arg] = stack[-1]
      case "GET" | "BINGET" | "LONG_BINGET":
        stack.append(memo[arg])
      case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
        stack.append(tuple(take(len(stack) - _TUPLES[name])))
      case "TUPLE":
        stack.append(tuple(take(marks.pop())))
      case "APPEND" | "APPENDS" as name:
        items = take(len(stack) - 1 if name == "APPEND" else marks.pop())
        _as(list, stack[-1]).extend(items)
      case "ADDITEMS":
        items = take(marks.pop())
        _as(set, stack[-1]).update(map(_key, items))
      case "SETITEM" | "SETITEMS" as name:
        items = take(len(stack) - 2 if name == "SETITEM" else marks.pop())
        pairs = zip(items[::2], items[1::2], strict=True)
        _as(dict, stack[-1]).update(_dict(pairs))
      case "GLOBAL":
        stack.append(_name(*arg.split(" ", 1)))
      case "STACK_GLOBAL":
        stack.append(_name(*take(len(stack) - 2)))
      case "REDUCE" | "NEWOBJ":
        called, args = take(len(stack) - 2)
        stack.append(_call(called, args))
      case "BUILD":
        state = stack.pop()
        _build(stack[-1], state)
      case "BINPERSID":
        stack.append(_storage(storage, *_as(tuple, stack.pop())))
      case name if re.search("INT|LONG|FLOAT|STRING|BYTES|UNICODE", name):
        stack.append(arg)
      case name:
        raise Refused(f"holds {name}, which torch.save doesn't write; {AGAIN}")
  return stack.pop()


def _as(kind: type[T], value: Any) -> T:
  """Returns the value, if it is of this type."""
  if not isinstance(value, kind):
    raise Refused(
      f"has a {type(value).__name__} in the place of a {kind.__name__}"
    )
  return value


def _key(key: Any) -> Any:
  """Returns a key, if plain: hashing tuples in tuples can take for ever."""
  parts = key if isinstance(key, tuple) else (key,)
  if not all(isinstance(x, str | bytes | int | float | None) for x in parts):
    raise Refused(f"has a {type(key).__name__} for a key")
  return key


def _dict(pairs: Iterable[Any]) -> dict[Any, Any]:
  return {_key(key): value for key, value in pairs}


def _name(module: Any, name: Any) -> _Name:
  """Returns the name of a class or function, if weights may need it."""
  module = "__builtin__" if module == "builtins" else _as(str, module)
  found = _Name(f"{module}.{_as(str, name)}")
  known = found in _CALLS or found in _HELD or _OF_CODE.fullmatch(found)
  if not known:
    raise Refused(
      f"names {found!r:.80}, which no weights need; if you trust it, {AGAIN}"
    )
  return found


def _call(called: Any, args: Any) -> Any:
  """Returns what our own function for a name makes of the arguments.

  Code that is asked for, by dill's names or by what these gave, is never made.
  """
  if isinstance(called, _Code) or _OF_CODE.fullmatch(_as(_Name, called)):
    return _Code()
  if called not in _CALLS:
    raise Refused(f"calls {called!r}, which no weights need; {AGAIN}")
  return _CALLS[called](*_as(tuple, args))


def _build(target: Any, state: Any) -> None:
  """Gives an object its attributes, or a number's type its byte order."""
  if isinstance(target, collections.OrderedDict | _Code):
    return  # of a state dict `_metadata`: the versions of its layers
  if isinstance(target, dict):
    target.update(_dict(_as(dict, state).items()))
  elif isinstance(target, np.ndarray) and target.base is None:
    _, shape, dtype, fortran, data = state
    data = _bytes(data)
    # Reshaped only for its check of the shape.
    shape = np.frombuffer(data, _as(np.dtype, dtype)).reshape(shape).shape
    target.__setstate__((1, shape, dtype, fortran, data))
  elif not isinstance(target, np.dtype) or state[1] not in ("<", "|"):
    raise Refused(f"sets the attributes of a {type(target).__name__}")


def _storage(
  storage: Load,
  kind: Any,
  name: Any = None,
  key: Any = None,
  location: Any = None,
  count: Any = None,
  view: Any = None,
) -> _Storage:
  """Returns the storage of a persistent id, whose fields these are."""
  if kind != "storage":
    raise Refused(f"refers to a {_as(str, kind)}, not to a storage; {AGAIN}")
  if _as(_Name, name) not in _READABLE:
    raise Refused(f"has a storage of class {name!r}; {AGAIN}")
  dtype = jnp.dtype(_READABLE[name])
  data = storage(_as(str, key), _as(int, count), dtype.itemsize)
  if view is not None:
    _, start, length = view
    if not 0 <= start <= start + length <= count:
      raise Refused(f"has a view that reaches outside storage {key!r}")
    data = data[start * dtype.itemsize :][: length * dtype.itemsize]
  return _Storage(data, dtype)


# What a pickle may call.


def _tensor(
  storage: Any,
  offset: Any,
  size: Any,
  strides: Any,
  requires_grad: Any = False,
  hooks: Any = None,
  metadata: Any = None,
) -> np.ndarray:
  """Returns the array of a tensor, over its storage's own memory.

  Offset and strides count values, not bytes. A tensor that would reach outside
  its storage is refused.
  """
  if metadata:
    raise Refused(f"has a tensor that stands for its conjugate; {AGAIN}")
  dtype, data = _as(_Storage, storage).dtype, storage.data
  ends = [
    (_as(int, n) - 1) * _as(int, stride)
    for n, stride in zip(_as(tuple, size), _as(tuple, strides), strict=True)
  ]
  last = _as(int, offset) + sum(ends)
  if min(0, offset, *size, *strides) < 0:
    raise Refused(f"has a tensor of size {size} and negative strides")
  if not all(size):
    return np.zeros(size, dtype)
  if (last + 1) * dtype.itemsize > data.size:
    raise Refused(
      f"has a tensor of size {size} that reaches outside its storage"
    )
  steps = [stride * dtype.itemsize for stride in strides]
  start = offset * dtype.itemsize
  array: np.ndarray = np.ndarray(size, dtype, data, start, steps)
  array.flags.writeable = False
  return array


def _tensor_v3(
  storage: Any, offset: Any, size: Any, strides: Any, *others: Any
) -> np.ndarray:
  """Returns the array of a tensor whose dtype has no class of storages."""
  requires_grad, hooks, dtype, *metadata = others
  if _as(_Name, dtype) not in _DTYPES:
    raise Refused(f"has a tensor of {dtype!r}; {AGAIN} as float32")
  storage = dataclasses.replace(_as(_Storage, storage), dtype=_DTYPES[dtype])
  unused = (requires_grad, hooks)
  return _tensor(storage, offset, size, strides, *unused, *metadata)


def _bytes(text: Any, encoding: Any = "latin1") -> bytes:
  """Returns bytes, which protocol 2 writes as text."""
  # The encoding is not looked up: a codec's name makes Python import it.
  return text if isinstance(text, bytes) else _as(str, text).encode("latin1")


def _dtype(code: Any, *_: Any) -> np.dtype:
  """Returns one of NumPy's dtypes of numbers, from a code such as `f4`."""
  if not re.fullmatch(r"[biufc]\d+", _as(str, code)):
    raise Refused(f"has values of numpy's dtype {code!r}; {AGAIN}")
  return np.dtype(code)


def _ordered(pairs: Any = None) -> collections.OrderedDict:
  return collections.OrderedDict(_dict(_as(list, pairs or [])))


def _scalar(dtype: Any, data: Any) -> np.generic:
  return np.frombuffer(_bytes(data), _as(np.dtype, dtype), 1)[0]


# How dill, with which MadryLab's robustness saves, writes functions and what
# they are made of: a schedule of learning rates as a lambda, say.
_OF_CODE = re.compile(
  r"dill\.(_dill|dill)\._(create_(function|code|cell|type)|load_type)"
  r"|__builtin__\.__main__|[\w.]+\.__dict__"
)

# Objects that hold settings, and are read as dicts of them.
_SETTINGS = (
  "argparse.Namespace", "cox.utils.Parameters",
  "omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata",
  "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig",
  "omegaconf.nodes.AnyNode", "types.SimpleNamespace", "yacs.config.CfgNode",
)  # fmt: skip

_CALLS: dict[str, Callable[..., Any]] = {
  **dict.fromkeys(_SETTINGS, lambda: {}),
  "__builtin__.bytes": lambda: b"",
  "__builtin__.set": lambda items: set(map(_key, _as(list, items))),
  "_codecs.encode": _bytes,
  "collections.Counter": lambda counts: _as(dict, counts),
  "collections.OrderedDict": _ordered,
  "collections.defaultdict": lambda factory: {},
  "numpy._core.multiarray._reconstruct": lambda *_: np.empty(0, np.uint8),
  "numpy._core.multiarray.scalar": _scalar,
  "numpy.core.multiarray._reconstruct": lambda *_: np.empty(0, np.uint8),
  "numpy.core.multiarray.scalar": _scalar,
  "numpy.dtype": _dtype,
  "pathlib.PosixPath": lambda *parts: "/".join(parts),
  "torch.Size": lambda size: tuple(_as(tuple, size)),
  "torch._tensor._rebuild_from_type_v2": lambda called, kind, args, state: (
    _call(called, args)
  ),
  "torch._utils._rebuild_parameter": lambda data, *_: data,
  "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
  "torch._utils._rebuild_tensor": _tensor,
  "torch._utils._rebuild_tensor_v2": _tensor,
  "torch._utils._rebuild_tensor_v3": _tensor_v3,
  "torch.device": lambda kind, *_: _as(str, kind),
}

# What a pickle may name without calling it.
_HELD = {
  *_READABLE, *_DTYPES, "numpy.ndarray", "torch.Tensor",
  "torch.nn.parameter.Parameter", "typing.Any", "__builtin__.dict",
  "__builtin__.float", "__builtin__.int", "__builtin__.list",
  "__builtin__.long", "__builtin__.str",
}  # fmt: skip
