"""The networks in a checkpoint, without what training has put around them.

A checkpoint is dicts in dicts, and a network the tensors of one of them, whose
keys may share a prefix (`module.model.`). Where a layout's mark is found, the
network begins; so prefixes need not be known.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from roli_jax.convert.name_maps import LAYOUTS, TEXT, Layout

# Of several networks the averaged ones go first, which are what the published
# accuracies are of, and what trained beside the model last.
_AVERAGED = re.compile(r"(.*_)?(ema|swa|averaged)(_.*)?")
_ORDER = ("last", "state_dict", "model_state_dict", "model", "net")
_BESIDE = ("attacker", "optimizer")
# What a model that normalises its own images calls mean and deviation.
_MEANS = {"mean": "std", "new_mean": "new_std", "mu": "sigma"}
_Numbers = tuple[float, ...] | None
COUNTER = "num_batches_tracked"
# Of a checkpoint: containers within one another, all of them, those of arrays;
# of one of these the networks. More are meant to keep us busy.
_DEEPEST, _MOST, _MOST_DICTS, _MOST_PREFIXES = 100, 10**6, 2000, 200


@dataclasses.dataclass(frozen=True)
class Network:
  """The tensors of one network, under their bare keys.

  Attributes:
    name: its dotted path in the checkpoint, "" for the checkpoint itself.
    layouts: those whose marks it bears, in their order.
    tensors: what it is made of.
    mean, std: of the normalisation that is beside it, if there is one.
    extras: what no pass needs, for the way back: counters, the normalisation.
  """

  name: str
  layouts: tuple[Layout, ...]
  tensors: dict[str, np.ndarray]
  mean: tuple[float, ...] | None
  std: tuple[float, ...] | None
  extras: dict[str, np.ndarray]


def find(source: Any, what: str, key: str | None = None) -> list[Network]:
  """The networks in a checkpoint, those to be preferred first.

  Args:
    source: dicts and lists of arrays, and of anything else.
    what: whose it is, for messages.
    key: which of them: its name, or a part of that, or "." for the checkpoint
      itself; None: all.

  Raises:
    ValueError: there is no tensor in it, or no network of that key.
  """
  found = [
    network for name, arrays in list(_dicts(source))
    for network in _split(name, arrays)
  ]  # fmt: skip
  if not found:
    held = list(source)[:5] if isinstance(source, Mapping) else source
    raise ValueError(
      f"{what} is no state dict and holds no tensors; it holds {held!r:.80}"
    )
  found.sort(key=_rank)
  if key is None:
    return found
  key = key.strip(".")
  tests = (
    lambda name: name == key,
    lambda name: name.startswith(f"{key}."),
    lambda name: f".{key}." in f".{name}.",
  )
  for test in tests:
    if chosen := [network for network in found if test(network.name)]:
      return chosen
  raise ValueError(f"{what} holds no network {key!r}; there is {named(found)}")


def named(networks: list[Network]) -> str:
  """Their names, for a message; "." is the checkpoint itself."""
  names = [network.name or "." for network in networks]
  return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def arrays(source: Any) -> dict[str, np.ndarray]:
  """All arrays of a checkpoint under their dotted paths."""
  return {
    f"{name}.{key}" if name else key: np.asarray(value)
    for name, tensors in _dicts(source)
    for key, value in tensors.items()
  }


def _dicts(source: Any) -> Iterator[tuple[str, dict[str, Any]]]:
  """Each dict that has arrays in it, or list, under its dotted path.

  Keys that are no words are those of an optimizer, which numbers its state.
  """
  waiting, seen, yielded = [("", source, 0)], 0, 0
  while waiting:
    name, value, depth = waiting.pop()
    seen += 1
    # A pickle may refer to what it is in, or twice to all that it holds.
    endless = depth > _DEEPEST or seen + len(waiting) > _MOST
    if endless or yielded > _MOST_DICTS:
      raise ValueError("the checkpoint has dicts within dicts without an end")
    if isinstance(value, Mapping):
      items = {k: v for k, v in value.items() if isinstance(k, str)}
    elif isinstance(value, list | tuple):
      items = {str(i): v for i, v in enumerate(value)}
    else:
      continue
    if found := {k: v for k, v in items.items() if _is_array(v)}:
      yielded += 1
      yield name, found
    alone = len(items) == 1 and not isinstance(value, Mapping)
    waiting += [
      (name if alone else f"{name}.{k}".lstrip("."), v, depth + 1)
      for k, v in reversed(items.items())
      if isinstance(v, Mapping | list | tuple)
    ]


def _is_array(value: Any) -> bool:
  """Whether it is an array of numbers, not of text say."""
  return hasattr(value, "shape") and np.asarray(value).dtype.kind in "biufcV"


def _rank(network: Network) -> tuple[bool, int]:
  words = network.name.split(".")
  ranks = [_ORDER.index(word) for word in words if word in _ORDER]
  if any(map(_AVERAGED.fullmatch, words)):
    ranks.append(-1)
  return bool(set(words) & set(_BESIDE)), min(ranks, default=len(_ORDER))


def _split(name: str, tensors: dict[str, Any]) -> list[Network]:
  """The networks in one dict: one for each prefix of keys that bear marks."""
  marks = _marks(tensors)
  if not marks:
    first, *rest = tensors
    words = first.split(".")[
      : min((_shared(first, k) for k in rest), default=0)
    ]
    return [_bare(name, ".".join(words), (), _arrays(tensors))]
  owned: dict[str, dict[str, np.ndarray]] = {prefix: {} for prefix in marks}
  for key, value in tensors.items():
    shared = {prefix: _shared(prefix, key) for prefix in marks}
    # Of two prefixes one of which begins with the other the longer is meant.
    inside = [p for p in marks if not p or key.startswith(f"{p}.")]
    most = max(shared.values())
    for prefix in [max(inside, key=len)] if inside else marks:
      if shared[prefix] == most:
        owned[prefix][key] = value
  return [
    _bare(
      f"{name}.{prefix}".strip("."),
      prefix,
      marks[prefix],
      _arrays(owned[prefix]),
    )
    for prefix in marks
  ]


def _marks(keys: Iterable[str]) -> dict[str, tuple[Layout, ...]]:
  """The prefixes before layouts' marks, and which layouts' they are."""
  found: dict[str, list[Layout]] = {}
  for layout in (*LAYOUTS, TEXT):
    pattern = re.compile(rf"(?:(.*?)\.)?(?:{layout.mark})")
    matches = [match for match in map(pattern.fullmatch, keys) if match]
    for prefix in dict.fromkeys(match[1] or "" for match in matches):
      found.setdefault(prefix, []).append(layout)
  if len(found) > _MOST_PREFIXES:
    raise ValueError(f"the checkpoint has {len(found)} networks in one dict")

  # A part of one layout's names may look like another's mark: a Swin's stage
  # like a ViT. A second network within has the same layout, as an average has.
  def stands(prefix):
    return all(
      set(found[prefix]) & set(found[outer])
      for outer in found
      if outer != prefix and (not outer or prefix.startswith(f"{outer}."))
    )

  return {p: tuple(layouts) for p, layouts in found.items() if stands(p)}


def _shared(prefix: str, key: str) -> int:
  """How many words of a prefix a key begins with; its last is its own."""
  pairs = zip(prefix.split("."), key.split(".")[:-1], strict=False)
  return sum(
    1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
  )


def _bare(
  name: str,
  prefix: str,
  layouts: tuple[Layout, ...],
  tensors: dict[str, np.ndarray],
) -> Network:
  """The network of these tensors, some of which may stand outside of it."""
  normalisation, mean, std = _normalisation(prefix, tensors)
  bare, extras = {}, dict(normalisation)
  for key, tensor in tensors.items():
    if key in normalisation:
      continue
    words = key.split(".")[_shared(prefix, key) :]
    short = ".".join(words)
    # Counted in training, and used by no pass.
    counts = (
      tensor.size == 1
      and tensor.dtype.kind in "biu"
      and words[-1] not in (*_MEANS, *_MEANS.values())
    )
    if counts or words[-1] == COUNTER:
      extras[short] = tensor
    elif key != f"{prefix}.{short}".lstrip(".") in tensors:
      bare[f"{key} (beside {prefix})"] = tensor
    else:
      bare[short] = tensor
  return Network(name, layouts, bare, mean, std, extras)


def _normalisation(
  prefix: str, tensors: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], _Numbers, _Numbers]:
  """The mean and deviation beside a network that are the nearest to it.

  Others go along with them if they say the same, and are left over if not.
  """
  pairs = [
    (key, re.sub(r"\w+$", _MEANS[leaf], key))
    for key, mean in tensors.items()
    if (leaf := key.rpartition(".")[2]) in _MEANS
    and mean.size in (1, 3)
    and mean.dtype.kind == "f"
  ]
  told = {
    pair: tuple(tuple(map(float, tensors[key].ravel())) for key in pair)
    for pair in pairs
    if pair[1] in tensors and tensors[pair[1]].dtype.kind == "f"
  }
  if not told:
    return {}, None, None
  nearest = min(told, key=lambda p: (-_shared(prefix, p[0]), p[0].count(".")))
  same = [key for pair in told if told[pair] == told[nearest] for key in pair]
  mean, std = told[nearest]
  return {key: tensors[key] for key in same}, mean, std


def _arrays(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """In this machine's byte order; half precision is widened."""
  arrays = {key: np.asarray(value) for key, value in values.items()}
  half = (np.float16, jnp.bfloat16)
  return {
    key: array.astype(
      np.float32 if array.dtype in half else array.dtype.newbyteorder("="),
      copy=False,
    )
    for key, array in arrays.items()
  }
