"""The pickles of PyTorch's checkpoints, read by a machine of our own.

A pickle is a program: it may call whatever it names. So none is ever given to
`pickle`. `run` knows the instructions that `torch.save` writes, and the calls
it knows are those of `_CALLS`; a file that names anything else is refused
before it gets further.
"""

import collections
import dataclasses
import pickletools
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

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

# The kinds that came after classes of storages, and stand on bare bytes.
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
  """Why a file isn't read, to stand after its path."""


class _Name(str):
  """What a pickle calls a thing of Python's: never looked up, only compared."""


@dataclasses.dataclass(frozen=True)
class _Storage:
  data: np.ndarray
  dtype: np.dtype


def check_size(key: str, size: int, expected: int) -> None:
  if size != expected:
    raise Refused(
      f"has {size} bytes in storage {key!r}, whose tensors need {expected}"
    )


# Pickles: a stack of values, and instructions that take from it and put.

_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_SET": set, "EMPTY_DICT": dict}


def run(instructions: Any, storage: Callable[..., np.ndarray]) -> Any:
  """The value of one pickle.

  Args:
    instructions: bytes, or a file that is left behind the pickle's end.
    storage: from a storage's key, its count of values and the size of one to
      its bytes.
  """
  stack: list[Any] = []
  marks: list[int] = []
  memo: dict[int, Any] = {}
  arg: Any

  def take(start):
    if not 0 <= start <= len(stack):
      raise Refused("is broken: its pickle takes what it never put")
    items = stack[start:]
    del stack[start:]
    return items

  for instruction, arg, _ in pickletools.genops(instructions):
    match instruction.name:
      case "PROTO" | "FRAME" | "STOP":
        pass
      case "NONE" | "NEWTRUE" | "NEWFALSE" as name:
        stack.append(_LITERALS[name])
      case "MARK":
        marks.append(len(stack))
      case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE" as name:
        memo[len(memo) if name == "MEMOIZE" else arg] = stack[-1]
      case "GET" | "BINGET" | "LONG_BINGET":
        stack.append(memo[arg])
      case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
        stack.append(tuple(take(len(stack) - _TUPLES[name])))
      case "TUPLE":
        stack.append(tuple(take(marks.pop())))
      case "EMPTY_LIST" | "EMPTY_SET" | "EMPTY_DICT" as name:
        stack.append(_EMPTY[name]())
      case "APPEND" | "APPENDS" as name:
        items = take(len(stack) - 1 if name == "APPEND" else marks.pop())
        _of(list, stack[-1]).extend(items)
      case "ADDITEMS":
        items = take(marks.pop())
        _of(set, stack[-1]).update(map(_key, items))
      case "SETITEM" | "SETITEMS" as name:
        items = take(len(stack) - 2 if name == "SETITEM" else marks.pop())
        pairs = zip(items[::2], items[1::2], strict=True)
        _of(dict, stack[-1]).update(_dict(pairs))
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
        stack.append(_storage(storage, *_of(tuple, stack.pop())))
      case name if re.search("INT|LONG|FLOAT|STRING|BYTES|UNICODE", name):
        stack.append(arg)
      case name:
        raise Refused(f"holds {name}, which torch.save doesn't write; {AGAIN}")
  return stack.pop()


def _of(kind: type, value: Any) -> Any:
  if not isinstance(value, kind):
    raise Refused(
      f"has a {type(value).__name__} in the place of a {kind.__name__}"
    )
  return value


def _key(key: Any) -> Any:
  """A key, if plain: the hash of a tuple of tuples can take for ever."""
  parts = key if isinstance(key, tuple) else (key,)
  if not all(isinstance(x, str | bytes | int | float | None) for x in parts):
    raise Refused(f"has a {type(key).__name__} for a key")
  return key


def _dict(pairs: Any) -> dict[Any, Any]:
  return {_key(key): value for key, value in pairs}


def _name(module: Any, name: Any) -> _Name:
  module = "__builtin__" if module == "builtins" else _of(str, module)
  found = _Name(f"{module}.{_of(str, name)}")
  if found not in _CALLS and found not in _HELD:
    raise Refused(
      f"names {found!r:.80}, which no weights need; if you trust it, {AGAIN}"
    )
  return found


def _call(called: Any, args: Any) -> Any:
  if _of(_Name, called) not in _CALLS:
    raise Refused(f"calls {called!r}, which no weights need; {AGAIN}")
  return _CALLS[called](*_of(tuple, args))


def _build(target: Any, state: Any) -> None:
  """Gives an object its attributes, or a number's type its byte order."""
  if isinstance(target, collections.OrderedDict):
    return  # a state dict's `_metadata`: the versions of its layers
  if isinstance(target, dict):
    target.update(_dict(_of(dict, state).items()))
  elif isinstance(target, np.ndarray) and target.base is None:
    _, shape, dtype, fortran, data = state
    data = _bytes(data)
    # Reshaped only for its check of the shape.
    shape = np.frombuffer(data, _of(np.dtype, dtype)).reshape(shape).shape
    target.__setstate__((1, shape, dtype, fortran, data))
  elif not isinstance(target, np.dtype) or state[1] not in ("<", "|"):
    raise Refused(f"sets the attributes of a {type(target).__name__}")


def _storage(
  storage: Callable[..., np.ndarray],
  kind: Any,
  name: Any = None,
  key: Any = None,
  location: Any = None,
  count: Any = None,
  view: Any = None,
) -> _Storage:
  """The storage of a persistent id."""
  if kind != "storage":
    raise Refused(f"refers to a {_of(str, kind)}, not to a storage; {AGAIN}")
  if _of(_Name, name) not in _READABLE:
    raise Refused(f"has a storage of class {name!r}; {AGAIN}")
  dtype = jnp.dtype(_READABLE[name])
  data = storage(_of(str, key), _of(int, count), dtype.itemsize)
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
  """The array of a tensor, over its storage's own memory."""
  if metadata:
    raise Refused(f"has a tensor that stands for its conjugate; {AGAIN}")
  dtype, data = _of(_Storage, storage).dtype, storage.data
  ends = [
    (_of(int, n) - 1) * _of(int, stride)
    for n, stride in zip(_of(tuple, size), _of(tuple, strides), strict=True)
  ]
  last = _of(int, offset) + sum(ends)
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
  storage, offset, size, strides, requires_grad, hooks, dtype, metadata=None
):
  """The names of dtypes that have no class of storages."""
  if _of(_Name, dtype) not in _DTYPES:
    raise Refused(f"has a tensor of {dtype!r}; {AGAIN} as float32")
  storage = dataclasses.replace(_of(_Storage, storage), dtype=_DTYPES[dtype])
  return _tensor(storage, offset, size, strides, metadata=metadata)


def _bytes(text: Any, encoding: Any = "latin1") -> bytes:
  """Bytes, which protocol 2 writes as text."""
  # Whatever the encoding is called: a codec's name makes Python import it.
  return text if isinstance(text, bytes) else _of(str, text).encode("latin1")


def _dtype(code: Any, *_: Any) -> np.dtype:
  if not re.fullmatch(r"[biufc]\d+", _of(str, code)):
    raise Refused(f"has values of numpy's dtype {code!r}; {AGAIN}")
  return np.dtype(code)


def _ordered(pairs: Any = None) -> collections.OrderedDict:
  return collections.OrderedDict(_dict(_of(list, pairs or [])))


def _scalar(dtype: Any, data: Any) -> Any:
  return np.frombuffer(_bytes(data), _of(np.dtype, dtype), 1)[0]


# Objects that hold settings, and are read as dicts of them.
_SETTINGS = (
  "argparse.Namespace", "omegaconf.base.ContainerMetadata",
  "omegaconf.base.Metadata", "omegaconf.dictconfig.DictConfig",
  "omegaconf.listconfig.ListConfig", "omegaconf.nodes.AnyNode",
  "types.SimpleNamespace", "yacs.config.CfgNode",
)  # fmt: skip

_CALLS: dict[str, Callable[..., Any]] = {
  **dict.fromkeys(_SETTINGS, lambda: {}),
  "__builtin__.bytes": lambda: b"",
  "__builtin__.set": lambda items: set(map(_key, _of(list, items))),
  "_codecs.encode": _bytes,
  "collections.Counter": lambda counts: _of(dict, counts),
  "collections.OrderedDict": _ordered,
  "collections.defaultdict": lambda factory: {},
  "numpy._core.multiarray._reconstruct": lambda *_: np.empty(0, np.uint8),
  "numpy._core.multiarray.scalar": _scalar,
  "numpy.core.multiarray._reconstruct": lambda *_: np.empty(0, np.uint8),
  "numpy.core.multiarray.scalar": _scalar,
  "numpy.dtype": _dtype,
  "pathlib.PosixPath": lambda *parts: "/".join(parts),
  "torch.Size": lambda size: tuple(_of(tuple, size)),
  "torch._tensor._rebuild_from_type_v2": lambda called, kind, args, state: (
    _call(called, args)
  ),
  "torch._utils._rebuild_parameter": lambda data, *_: data,
  "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
  "torch._utils._rebuild_tensor": _tensor,
  "torch._utils._rebuild_tensor_v2": _tensor,
  "torch._utils._rebuild_tensor_v3": _tensor_v3,
  "torch.device": lambda kind, *_: _of(str, kind),
}

# What a pickle may name without calling it.
_HELD = {
  *_READABLE, *_DTYPES, "numpy.ndarray", "torch.Tensor",
  "torch.nn.parameter.Parameter", "typing.Any", "__builtin__.dict",
  "__builtin__.float", "__builtin__.int", "__builtin__.list",
  "__builtin__.long", "__builtin__.str",
}  # fmt: skip
