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

import numpy as np

from roli_jax.convert import plain
from roli_jax.convert.name_maps import LAYOUTS, TEXT, Layout

# Averaged networks go first, since published accuracies are theirs, and what
# was trained beside the model last.
_AVERAGED = re.compile(r"(?!.*before)(.*_)?(ema|swa|averaged)(_.*)?")
_ORDER = ("last", "state_dict", "model_state_dict", "model", "net")
_BESIDE = ("attacker", "optimizer")
# What a model that normalises its own images calls mean and deviation.
_MEANS = {"mean": "std", "new_mean": "new_std", "mu": "sigma"}
_Numbers = tuple[float, ...] | None  # one number, or one a channel
COUNTER = "num_batches_tracked"
# Limits of a checkpoint, beyond which it is meant to keep us busy.
_DEEPEST = 100  # containers within one another
_MOST = 10**6  # containers
_MOST_DICTS = 2000  # containers of arrays
_MOST_PREFIXES = 200  # networks in one of these


@dataclasses.dataclass(frozen=True)
class Network:
  """The tensors of one network, under their bare keys.

  Attributes:
    name: its dotted path in the checkpoint, "" for the checkpoint itself.
    layouts: those whose marks it bears, in the order of `LAYOUTS`.
    tensors: its tensors.
    mean: of the normalisation beside it, one number or one a channel, in units
      of [0, 1]; None without one.
    std: its standard deviation, in the same form.
    extras: tensors that no pass needs, so that they can be written again:
      counters, the normalisation.
  """

  name: str
  layouts: tuple[Layout, ...]
  tensors: dict[str, np.ndarray]
  mean: _Numbers
  std: _Numbers
  extras: dict[str, np.ndarray]


def find(source: Any, what: str, key: str | None = None) -> list[Network]:
  """Returns the networks in a checkpoint, those to be preferred first.

  Args:
    source: dicts and lists of arrays, and of anything else.
    what: the name of the file, for messages.
    key: the name of a network, or a part of it, or "." for the checkpoint
      itself; None: all networks.

  Raises:
    ValueError: there is no tensor in it, or no network of that key.
  """
  # All dicts are found, and limits kept, before any is split.
  dicts = list(_dicts(source))
  found = [network for item in dicts for network in _split(*item)]
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
  """Returns their names, for a message; "." is the checkpoint itself."""
  names = [network.name or "." for network in networks]
  return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def arrays(source: Any) -> dict[str, np.ndarray]:
  """Returns all arrays of a checkpoint under their dotted paths."""
  return {
    f"{name}.{key}" if name else key: np.asarray(value)
    for name, tensors in _dicts(source)
    for key, value in tensors.items()
  }


def _dicts(source: Any) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields each dict and list that has arrays in it, after its dotted path.

  Keys that are no strings are those of an optimizer, which numbers its state.
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
  """Returns whether it is an array of numbers, not of text or objects."""
  return hasattr(value, "shape") and np.asarray(value).dtype.kind in "biufcV"


def _rank(network: Network) -> tuple[bool, int]:
  """Returns the place of a network, by its name; the lowest is preferred."""
  words = network.name.split(".")
  ranks = [_ORDER.index(word) for word in words if word in _ORDER]
  if any(map(_AVERAGED.fullmatch, words)):
    ranks.append(-1)
  return bool(set(words) & set(_BESIDE)), min(ranks, default=len(_ORDER))


def _split(name: str, tensors: dict[str, Any]) -> list[Network]:
  """Returns the networks in one dict, one for each prefix of marked keys."""
  marks = _marks(tensors)
  if not marks:
    first, *rest = tensors
    shared_by_all = min((_shared(first, key) for key in rest), default=0)
    prefix = ".".join(first.split(".")[:shared_by_all])
    return [_bare(name, prefix, (), _arrays(tensors))]
  owned: dict[str, dict[str, np.ndarray]] = {prefix: {} for prefix in marks}
  for key, value in tensors.items():
    shared = {prefix: _shared(prefix, key) for prefix in marks}
    # Of two prefixes one of which begins with the other the longer is meant.
    inside = [p for p in marks if not p or key.startswith(f"{p}.")]
    most = max(shared.values())
    for prefix in [max(inside, key=len)] if inside else marks:
      if shared[prefix] == most:
        owned[prefix][key] = value
  networks = []
  for prefix, layouts in marks.items():
    path = f"{name}.{prefix}".strip(".")
    networks.append(_bare(path, prefix, layouts, _arrays(owned[prefix])))
  return networks


def _marks(keys: Iterable[str]) -> dict[str, tuple[Layout, ...]]:
  """Returns the prefixes before layouts' marks, and those layouts."""
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
  def stands(prefix: str) -> bool:
    return all(
      set(found[prefix]) & set(found[outer])
      for outer in found
      if outer != prefix and (not outer or prefix.startswith(f"{outer}."))
    )

  return {p: tuple(layouts) for p, layouts in found.items() if stands(p)}


def _shared(prefix: str, key: str) -> int:
  """Returns how many words of a prefix a key begins with, its last left out."""
  pairs = zip(prefix.split("."), key.split(".")[:-1], strict=False)
  return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _bare(
  name: str,
  prefix: str,
  layouts: tuple[Layout, ...],
  tensors: dict[str, np.ndarray],
) -> Network:
  """Returns the network of these tensors, some of which may be beside it."""
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
  """Returns the nearest mean and deviation beside a network, and their tensors.

  Other tensors of equal values belong to them; tensors of other values stay.
  """
  pairs = [
    (key, re.sub(r"\w+$", _MEANS[leaf], key))
    for key, mean in tensors.items()
    if (leaf := key.rpartition(".")[2]) in _MEANS
    and mean.size in (1, 3)
    and mean.dtype.kind == "f"
  ]
  values = {
    pair: tuple(tuple(map(float, tensors[key].ravel())) for key in pair)
    for pair in pairs
    if pair[1] in tensors and tensors[pair[1]].dtype.kind == "f"
  }
  if not values:
    return {}, None, None
  nearest = min(values, key=lambda p: (-_shared(prefix, p[0]), p[0].count(".")))
  mean, std = values[nearest]
  if max(mean) > 1:
    raise ValueError(
      f"{nearest[0]} is {mean}: of pixels in [0, 255], and images here are in"
      " [0, 1]; divide it and the deviation by 255"
    )
  same = [key for pair in values if values[pair] == (mean, std) for key in pair]
  return {key: tensors[key] for key in same}, mean, std


def _arrays(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns arrays in this machine's byte order, half precision widened."""
  return {key: plain.widened(np.asarray(v)) for key, v in values.items()}
