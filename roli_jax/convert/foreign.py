"""State dicts of other frameworks: to our trees, and back."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from roli_jax import models, specs, trees
from roli_jax.convert import resample
from roli_jax.convert.bundle import Bundle, Coverage, with_classes, zero_head
from roli_jax.convert.layouts import FORMATS, LAYOUTS, TEXT, Layout
from roli_jax.types import Params, PyTree

# Where checkpoints of training keep their weights: averaged ones first, which
# are what the published accuracies are of.
_WRAPPERS = (
  "state_dict_ema", "model_ema", "ema_state_dict", "ema", "last", "state_dict",
  "model_state_dict", "model", "net",
)  # fmt: skip
_PREFIXES = ("module", "_orig_mod", "model", "net")
# What a model that normalises its own images calls mean and deviation.
_NORMALISATION = re.compile(r"(?:.*\.)?(mean|mu|std|sigma)")
# Counted by PyTorch in training, and used by none of its passes.
_COUNTER = "num_batches_tracked"


@dataclasses.dataclass(frozen=True)
class _File:
  """A state dict without wrappers and prefixes.

  Attributes:
    tensors: of the model, under their bare keys.
    mean, std: the normalisation that the file holds, if it does.
    extras: tensors that no pass needs, for the way back.
    wrapped: the key under which the weights were.
  """

  tensors: dict[str, np.ndarray]
  mean: tuple[float, ...] | None
  std: tuple[float, ...] | None
  extras: dict[str, np.ndarray]
  wrapped: str


def to_bundle(
  source: Mapping[str, Any],
  model: str | None = None,
  format: str | None = None,
  mean: Sequence[float | int] | None = None,
  std: Sequence[float | int] | None = None,
  num_classes: int | None = None,
  image_size: int | None = None,
  what: str = "the state dict",
) -> Bundle:
  """A state dict as a bundle; see `convert.load`.

  Raises:
    ValueError: tensors that are missing, left over, of another shape or not
      finite; a layout that can't be told; both sides are listed.
  """
  if model is not None:
    specs.choose(models.MODELS, model, "model")
  if format is not None:
    specs.choose(FORMATS, format, "format")
  file = bare(source, what)
  layout = _layout(file, model, format, what)
  whole, expected = _model(layout, file, model or _named(layout, file, what),
                           num_classes)  # fmt: skip
  keys = layout.keys(expected)
  head = {key for key, paths in keys.items() if paths[0].startswith("head/")}
  if num_classes is not None and not head & file.tensors.keys():
    keys = {key: paths for key, paths in keys.items() if key not in head}
  ignored = [
    key for key in file.tensors if key not in keys and layout.drops(key)
  ]
  shapes = {k: v.shape for k, v in file.tensors.items() if k not in ignored}
  trees.check_shapes(
    shapes, _foreign_shapes(layout, keys, expected), f"{what}, {layout.name}"
  )
  tree = _tree(layout, keys, expected, file, what)
  params = Params(backbone=tree["backbone"], peft={}, head=tree.get("head", {}))
  named = format or layout.formats[0]
  own = FORMATS[named]
  fits = own is not None and len(own[0]) == whole.channels
  default = own if own and fits else (whole.mean, whole.std)
  whole = dataclasses.replace(
    whole,
    mean=each_channel(mean, file.mean or default[0], "mean"),
    std=each_channel(std, file.std or default[1], "std"),
  )
  resampled: list[str] = []
  if image_size is not None:
    whole, params, resampled = resample.to_size(whole, params, image_size)
  if num_classes is not None:
    whole = with_classes(whole, num_classes)
    params = dataclasses.replace(params, head=zero_head(whole))
  dropped = head & shapes.keys() if num_classes is not None else set()
  coverage = Coverage(
    layout=layout.name,
    wrapped=file.wrapped,
    used=tuple(key for key in keys if key not in dropped),
    resampled=tuple(k for k, p in keys.items() if set(p) & set(resampled)),
    dropped=tuple(sorted(dropped)),
    ignored=tuple(sorted({*ignored, *file.extras})),
    normalised_by=_normalised_by(mean, file, named),
  )
  stats = tree.get("stats", {})
  return Bundle(whole, params, stats, layout.name, file.extras, coverage)


def to_text(
  source: Mapping[str, Any],
  num_heads: int | None = None,
  act: str = "gelu",
  what: str = "the state dict",
) -> tuple[models.Text, PyTree]:
  """The text tower in a state dict of a CLIP; see `convert.text_tower`.

  Raises:
    ValueError: there is none; tensors that are missing, left over, of another
      shape or not finite; a width that says nothing of the heads.
  """
  specs.choose(models.text.ACTS, act, "act")
  file = bare(source, what)
  sized = ("token_embedding.weight", "positional_embedding", "text_projection")
  shapes = [np.shape(file.tensors.get(key, 0)) for key in sized]
  if any(len(shape) != 2 for shape in shapes):
    keys = ", ".join(list(file.tensors)[:4])
    raise ValueError(
      f"{what} ({keys}, ...) holds no text tower of open_clip: expected"
      f" {', '.join(sized)} of two axes, got shapes {shapes}"
    )
  (vocab, width), (context, _), (_, embed) = shapes
  if num_heads is None and width % 64:
    raise ValueError(
      f"{what} is of width {width}, which is no multiple of 64, the width of a"
      " head in CLIP: say num_heads"
    )
  num_heads = num_heads or width // 64
  if width % num_heads:
    raise ValueError(f"{num_heads} heads do not divide a width of {width}")
  block = re.compile(r"transformer\.resblocks\.(\d+)\.")
  depth = len({m[1] for m in map(block.match, file.tensors) if m})
  module = models.Text(
    vocab, width, depth, num_heads, context, embed, models.text.ACTS[act]
  )
  expected = _text_shapes(module)
  names = TEXT.keys(expected)
  got = {k: v.shape for k, v in file.tensors.items() if not TEXT.drops(k)}
  trees.check_shapes(got, _foreign_shapes(TEXT, names, expected), what)
  return module, _tree(TEXT, names, expected, file, what)


def _text_shapes(module: models.Text) -> dict[str, tuple[int, ...]]:
  ids = np.zeros((1, 1), np.int32)
  like = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
  return {k: tuple(v.shape) for k, v in trees.paths(like).items()}


def _normalised_by(mean: Any, file: _File, format: str) -> str:
  if mean is not None:
    return "as given"
  if file.mean is not None:
    return "of the file"
  return f"of the format {format}: check that they are the file's"


def _tree(
  layout: Layout,
  keys: dict[str, list[str]],
  shapes: dict[str, tuple[int, ...]],
  file: _File,
  what: str,
) -> dict[str, Any]:
  """The leaves of these keys, as a tree."""
  leaves: dict[str, np.ndarray] = {}
  for key, paths in keys.items():
    tensor = file.tensors[key]
    if not np.isfinite(tensor).all():
      raise ValueError(f"{what}: {key} holds values that are not finite")
    each = layout.inward(key, paths, tensor, [shapes[p] for p in paths])
    leaves.update(zip(paths, each, strict=True))
  return trees.unpaths(leaves)


def to_state_dict(bundle: Bundle, format: str) -> dict[str, np.ndarray]:
  """The bundle under the names of a format, which is undone by `to_bundle`.

  Of a format with more than one layout, the one that the bundle came from, or
  the newest.

  Raises:
    ValueError: the format has no names for this model, or for what a method
      has added to it.
  """
  specs.choose(FORMATS, format, "format")
  known = [
    layout for layout in LAYOUTS
    if format in layout.formats and layout.holds(bundle.model.backbone)
  ]  # fmt: skip
  if not known:
    raise ValueError(f"{format} has no names for a {bundle.model.name}")
  if bundle.params.peft:
    raise ValueError(
      f"{format} has no names for {list(trees.paths(bundle.params.peft))[:2]};"
      " merge what the method has added first"
    )
  layout = next((x for x in known if x.name == bundle.layout), known[0])
  arrays = {
    path: np.asarray(leaf)
    for path, leaf in _paths(bundle.params, bundle.stats).items()
  }
  state = {
    key: layout.outward(key, paths, [arrays[path] for path in paths])
    for key, paths in layout.keys(arrays).items()
  }
  for key in [k for k in state if k.endswith(".running_var")]:
    counter = key.replace("running_var", _COUNTER)
    state[counter] = bundle.extras.get(counter, np.zeros((), np.int64))
  if format != "roli":
    return state
  # A Sequential of resizing (or not), normalisation and the network.
  numbers = re.findall(r"\b(\d+)\.mean\b", " ".join(bundle.extras))
  first = numbers[0] if numbers else "0"
  return {
    f"{first}.mean": np.array(bundle.model.mean, np.float32),
    f"{first}.std": np.array(bundle.model.std, np.float32),
    **{f"{int(first) + 1}.{key}": value for key, value in state.items()},
  }


def format_of(bundle: Bundle) -> str:
  """The main format of the layout that the bundle came from."""
  return next(x.formats[0] for x in LAYOUTS if x.name == bundle.layout)


def _paths(params: Params, stats: Any) -> dict[str, Any]:
  return trees.paths(
    {"backbone": params.backbone, "head": params.head, "stats": stats}
  )


def bare(source: Mapping[str, Any], what: str) -> _File:
  """The state dict without what training wraps around it.

  Raises:
    ValueError: there is no tensor in it.
  """
  state, wrapped = source, ""
  while True:
    inside = [k for k in _WRAPPERS if _holds_tensors(state.get(k))]
    if not inside:
      break
    state, wrapped = state[inside[0]], inside[0]
  tensors = {k: _array(v) for k, v in state.items() if hasattr(v, "shape")}
  if not tensors:
    raise ValueError(f"{what} holds no tensors; it holds {list(source)[:5]}")
  normalisation = {
    key: value
    for key, value in tensors.items()
    if _NORMALISATION.fullmatch(key) and value.size in (1, 3)
  }
  told = {
    _NORMALISATION.fullmatch(key)[1]: tuple(float(x) for x in value.ravel())  # type: ignore[index]
    for key, value in normalisation.items()
  }
  bare = {k: v for k, v in tensors.items() if k not in normalisation}
  while True:
    firsts = {key.split(".")[0] for key in bare}
    common = len(firsts) == 1 and (
      firsts <= set(_PREFIXES) or all(first.isdigit() for first in firsts)
    )
    if not common:
      break
    bare = {key.partition(".")[2]: value for key, value in bare.items()}
  extras = {k: v for k, v in bare.items() if k.endswith(f".{_COUNTER}")}
  return _File(
    tensors={k: v for k, v in bare.items() if k not in extras},
    mean=told.get("mean", told.get("mu")),
    std=told.get("std", told.get("sigma")),
    extras={**extras, **normalisation},
    wrapped=wrapped,
  )


def _holds_tensors(value: Any) -> bool:
  """Whether it is a dict with a tensor in it, or a dict with such a dict."""
  return isinstance(value, Mapping) and any(
    hasattr(x, "shape") or _holds_tensors(x) for x in value.values()
  )


def _array(value: Any) -> np.ndarray:
  """A NumPy array; half precision is widened."""
  array = np.asarray(value)
  # bfloat16 is none of NumPy's own kinds.
  half = array.dtype.itemsize == 2 and array.dtype.kind in "fV"
  return array.astype(np.float32) if half else array


def _three(given: Any, otherwise: Any, what: str) -> tuple[float, ...]:
  values = tuple(float(x) for x in (otherwise if given is None else given))
  if len(values) != len(otherwise) or not np.isfinite(values).all():
    raise ValueError(
      f"expected {what} as {len(otherwise)} numbers, got {given}"
    )
  return values


def _layout(
  file: _File, model: str | None, format: str | None, what: str
) -> Layout:
  """The layout whose mark the file bears."""
  known = [x for x in LAYOUTS if format is None or format in x.formats]
  if model is not None:
    backbone = models.create(model, 2).backbone
    known = [x for x in known if x.holds(backbone)]
    if not known:
      raise ValueError(f"{format} has no names for a {model}")
  marked = [
    layout for layout in known
    if any(re.fullmatch(layout.mark, key) for key in file.tensors)
  ]  # fmt: skip
  if marked:
    return marked[-1]
  if model is not None and format is not None:
    return known[0]  # told; what is missing is listed
  formats = sorted({x for layout in known for x in layout.formats})
  keys = ", ".join(list(file.tensors)[:4])
  raise ValueError(
    f"{what}: its keys ({keys}, ...) are of no layout of"
    f" {model or 'any model'} in {', '.join(formats)}"
  )


def _model(
  layout: Layout, file: _File, name: str, num_classes: int | None
) -> tuple[models.Model, dict[str, tuple[int, ...]]]:
  """The model that the file is of, and the shapes of its leaves.

  The width of its head, and the size of its images, are the file's.
  """
  head = layout.key("head/kernel")
  kernel = file.tensors.get(head)
  if kernel is None and num_classes is None:
    raise ValueError(
      f"there is no classifier {head!r} in the file: say of how many classes"
      " a new one shall be (num_classes)"
    )
  if kernel is None:
    width = 2
  elif kernel.ndim != 2:
    raise ValueError(f"expected {head} of two axes, got {kernel.shape}")
  else:
    width = max(kernel.shape[1 if head in layout.plain else 0], 2)
  model = _headed(layout, name, width)
  expected = _shapes(model)
  have = {
    path: file.tensors[key].shape
    for key, paths in layout.keys(filter(resample.can, expected)).items()
    for path in paths
    if key in file.tensors and file.tensors[key].ndim >= 2
  }
  size = resample.native_size(model.backbone, have)
  if size in (0, model.image_size):
    return model, expected
  model = dataclasses.replace(model, image_size=size)
  return model, _shapes(model)


def _headed(layout: Layout, name: str, width: int) -> models.Model:
  """The model under the kind of head that files of the layout hold."""
  projects = layout.kind == "clip"
  make = models.heads.projection if projects else models.heads.linear
  model = models.create(name, width)
  return dataclasses.replace(model, head=make(width))


@functools.cache
def _shapes(model: models.Model) -> dict[str, tuple[int, ...]]:
  """The shape of each leaf, parameters and statistics."""
  params, stats = jax.eval_shape(model.init, jax.random.key(0))
  return {k: tuple(v.shape) for k, v in _paths(params, stats).items()}


def _foreign_shapes(
  layout: Layout,
  keys: dict[str, list[str]],
  shapes: dict[str, tuple[int, ...]],
) -> dict[str, tuple[int, ...]]:
  """The shape of each foreign tensor, from those of our leaves."""
  zero = np.zeros((), np.int8)
  return {
    key: layout.outward(
      key, paths, [np.broadcast_to(zero, shapes[path]) for path in paths]
    ).shape
    for key, paths in keys.items()
  }


def _named(layout: Layout, file: _File, what: str) -> str:
  """The model whose tensors these are, by the shapes of its backbone."""
  got = {
    key: tensor.shape
    for key, tensor in file.tensors.items()
    if not layout.drops(key)
  }
  unlike = {}
  for name in models.MODELS:
    model = _headed(layout, name, 2)
    if not layout.holds(model.backbone):
      continue
    shapes = _shapes(model)
    keys = layout.keys(shapes)
    free = {
      key
      for key, paths in keys.items()
      if paths[0].startswith("head/") or resample.can(paths[0])
    }
    theirs = _foreign_shapes(layout, keys, shapes)
    unlike[name] = sum(
      got.get(key) != theirs.get(key)
      for key in (got.keys() | theirs.keys()) - free
    )
    if not unlike[name]:
      return name
  nearest = min(unlike, key=lambda name: unlike[name])
  raise ValueError(
    f"{what} has names of the layout {layout.name}, and shapes of none of its"
    f" models; nearest is {nearest}, but for {unlike[nearest]} tensors: say"
    f" model={nearest} to see which"
  )


def each_channel(
  given: Sequence[float | int] | None, otherwise: tuple[float, ...], what: str
) -> tuple[float, ...]:
  """What is given, one number a channel.

  Raises:
    ValueError: as many numbers as `otherwise` has were expected.
  """
  values = otherwise if given is None else tuple(float(x) for x in given)
  if len(values) != len(otherwise) or not np.isfinite(values).all():
    raise ValueError(
      f"expected {len(otherwise)} finite numbers as {what}, got {given}"
    )
  return values
