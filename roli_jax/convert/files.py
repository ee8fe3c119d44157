"""Weights from files of any kind, and into them."""

import dataclasses
import importlib.resources
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from roli_jax import models
from roli_jax.convert import (
  assumptions,
  contents,
  named,
  naming,
  networks,
  registry,
  state_dict,
  text,
  torch_file,
)
from roli_jax.convert import bundle as bundles
from roli_jax.convert.bundle import Bundle
from roli_jax.types import PyTree

_SIZES = (*models.SIZES, "channels")
_TORCH = (".pth", ".pt", ".th", ".bin", ".ckpt", ".tar")


def shipped(model: str) -> dict[str, pathlib.Path]:
  """Returns the weights of a model that come with the package, by name."""
  folder = pathlib.Path(str(importlib.resources.files("roli_jax"))) / "weights"
  files = sorted(folder.glob(f"{model}_*.safetensors"))
  return {file.stem.removeprefix(f"{model}_"): file for file in files}


def find(model: str, weights: str) -> pathlib.Path:
  """Returns the file that a config means by a model and its weights.

  Args:
    model: a name in `models.MODELS` or `models.FAMILIES`; "": any.
    weights: the name of shipped weights (`robust`), or a path.

  Raises:
    ValueError: there are no such weights; the message says which there are.
  """
  names = shipped(model) if model else {}
  if weights in names:
    return names[weights]
  path = pathlib.Path(weights).expanduser()
  if weights and path.exists():
    inside = path / f"{model}.safetensors"  # as --mode=convert writes it
    return inside if inside.exists() else path
  shipped_ones = f"; {model} comes with {', '.join(names)}" if names else ""
  of = f" of {model}" if model else ""
  raise ValueError(
    f"no weights{of} at {weights!r}{shipped_ones}; give a file's path or a"
    " published name (--mode=zoo) as --config.backbone.weights="
  )


def load(
  source: str | pathlib.Path | Mapping[str, Any] | list | tuple,
  model: str | None = None,
  format: str | None = None,
  mean: Sequence[float | int] | None = None,
  std: Sequence[float | int] | None = None,
  num_classes: int | None = None,
  image_size: int | None = None,
  *,
  act: str | None = None,
  norm_eps: float | None = None,
  pool: str | None = None,
  key: str | None = None,
  patch: int | None = None,
  width: int | Sequence[int] | None = None,
  depth: int | Sequence[int] | None = None,
  heads: int | Sequence[int] | None = None,
  channels: int | None = None,
  strict: bool = False,
) -> Bundle:
  """Returns the bundle of published weights, or of any file of weights.

  What names and shapes don't determine is assumed: a warning says so, and
  `bundle.assumed`. `bundle.coverage.notes()` lists the other networks that the
  file holds.

  Args:
    source: the name of published weights, see `registry`, which bring all that
      follows with them; a safetensors file, ours or not, a PyTorch checkpoint
      or a .npz, which are recognised by their content; a directory that holds
      our bundle, or a checkpoint of one of our runs; or a state dict: names to
      arrays, perhaps in dicts and lists.
    model: a name in `models.MODELS` or `models.FAMILIES`; None: recognised by
      shapes.
    format: a name in `convert.FORMATS`; None: recognised by names. Not used
      for files of ours.
    mean: per channel, in units of [0, 1]; None: the file's own, or else the
      format's.
    std: per channel, by which pixels are divided; None: as for `mean`.
    num_classes: None keeps the file's classifier; a number drops it and puts a
      zero head of that width.
    image_size: the side that images are resized to inside the model; another
      one than the weights' resamples their positions. None: the weights'.
    act: the activation of a ViT, an XCiT or a residual network, as of
      `models.with_options`; no file tells. None: the model's.
    norm_eps: what its normalisations add to variances; likewise.
    pool: the feature of a ViT: `token`, the class token, or `mean`, the mean
      of the others. None: as the names show, else `token`.
    key: the network of a checkpoint, by its dotted path or a part of it, such
      as `ema`. None: an averaged one, else the model, else the first whose
      names are known.
    patch: of a family, as of `models.create`. None, here and below: what the
      tensors show.
    width: likewise.
    depth: likewise.
    heads: likewise; those of a `vit` show nowhere, and must be told for a file
      that isn't ours.
    channels: likewise.
    strict: whether it is an error that something has to be assumed.

  Raises:
    ValueError: the file is not there, can't be read, or is refused; its tensors
      are not the model's (both sides are listed), not floats or not finite; it
      holds no network of that key; an option that the model hasn't; under
      `strict`, an assumption.
  """
  options = {
    "model": model,
    "format": format,
    "mean": mean,
    "std": std,
    "num_classes": num_classes,
    "image_size": image_size,
    "act": act,
    "norm_eps": norm_eps,
    "pool": pool,
    "key": key,
    "patch": patch,
    "width": width,
    "depth": depth,
    "heads": heads,
    "channels": channels,
  }
  told = {name: value for name, value in options.items() if value is not None}
  what = "the state dict"
  if isinstance(source, str | pathlib.Path):
    what = str(source)
  if registry.is_name(source):
    checkpoint = registry.named(what)
    path = named.find(checkpoint)
    checkpoint = named.described(checkpoint, path)
    bundle = _load(path, named.arguments(checkpoint, told), f"{what}, {path}")
    bundle = named.checked(bundle, checkpoint, told)
  else:
    bundle = _load(source, told, what)
  assumptions.tell(bundle, what, strict)
  return bundle


def _load(source: Any, told: dict[str, Any], what: str) -> Bundle:
  """Returns the bundle of a file or state dict; see `load`.

  Args:
    source: as of `load`, but no name.
    told: the arguments of `load` that were given.
    what: what the source is called in messages.
  """
  found: Any = source
  if isinstance(source, str | pathlib.Path):
    found = contents.of(pathlib.Path(source).expanduser())
  chosen = {k: told[k] for k in ("act", "norm_eps") if k in told}
  others = {k: v for k, v in told.items() if k not in chosen}
  if not isinstance(found, Bundle):
    bundle = state_dict.to_bundle(found, what=what, **others)
    model = models.with_options(bundle.model, **chosen)
    bundle = dataclasses.replace(bundle, model=model)
    return dataclasses.replace(bundle, assumed=assumptions.of(bundle, told))
  others.pop("format", None)
  if name := others.pop("model", None):
    if name != found.model.name:
      raise ValueError(f"{what} is a {found.model.name}, not a {name}")
    assumed = {k: v for k, v in found.assumed.items() if k != "model"}
    found = dataclasses.replace(found, assumed=assumed)
  sizes = {k: others.pop(k) for k in _SIZES if k in others}
  models.check_sizes(found.model, sizes, what)
  return adjusted(found, **others, **chosen)


def read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the arrays of any file that can be read, as they are.

  Args:
    path: as `source` of `load`.

  Returns:
    Arrays by their names in the file, dotted where dicts are in dicts:
    `{"model": {"fc.bias": ...}}` has `model.fc.bias`. A bundle's leaves stand
    under their paths.

  Raises:
    ValueError: the file can't be read, or is refused.
  """
  found = contents.of(pathlib.Path(path).expanduser())
  if isinstance(found, Bundle):
    return naming.leaves(found.params, found.stats)
  return networks.arrays(found)


def text_tower(
  source: str | pathlib.Path | Mapping[str, Any],
  num_heads: int | None = None,
  act: str = "gelu",
) -> tuple[models.Text, PyTree]:
  """Returns the text tower in a CLIP's file, and its parameters.

  These are the tensors that `load` ignores in an open_clip file, `logit_scale`
  included. `tokenizer.Tokenizer` encodes texts for it.

  Args:
    source: a safetensors file or a PyTorch checkpoint with open_clip's names,
      or a state dict.
    num_heads: of attention, which no file holds; None: width / 64, as in
      every CLIP.
    act: `gelu`, or `quick_gelu` where OpenAI's own weights are in the file or
      were what training began with, which no file holds.

  Raises:
    ValueError: the file can't be read, or is refused; it holds no text tower,
      or other tensors beside it; tensors of other shapes or not finite.
  """
  if isinstance(source, Mapping):
    return text.to_text(source, num_heads, act)
  path = pathlib.Path(source).expanduser()
  found = contents.of(path)
  if isinstance(found, Bundle):
    raise ValueError(
      f"{path} is a bundle of ours, which has no text tower: name the file that"
      " it is from"
    )
  return text.to_text(found, num_heads, act, str(path))


def adjusted(
  found: Bundle,
  mean: Sequence[float | int] | None = None,
  std: Sequence[float | int] | None = None,
  num_classes: int | None = None,
  image_size: int | None = None,
  pool: str | None = None,
  key: str | None = None,
  act: str | None = None,
  norm_eps: float | None = None,
) -> Bundle:
  """Returns a bundle of ours with the options of `load`.

  Raises:
    ValueError: a key, which our files don't have; options that `load` refuses.
  """
  if key is not None:
    raise ValueError(
      f"there is no network {key!r}: these weights are ours, of one alone"
    )
  model = models.with_options(
    found.model, pool=pool, act=act, norm_eps=norm_eps
  )
  told = {
    "act": act, "norm_eps": norm_eps, "pool": pool, "mean": mean, "std": std,
    "image_size": image_size,
  }  # fmt: skip
  assumed = {k: v for k, v in found.assumed.items() if told.get(k) is None}
  bundle = dataclasses.replace(found, model=model, assumed=assumed)
  return bundles.fitted(bundle, mean, std, num_classes, image_size)[0]


def save(
  bundle: Bundle,
  path: str | pathlib.Path,
  format: str | None = None,
  half: bool = False,
) -> None:
  """Writes the bundle, or its state dict in another format.

  Args:
    bundle: as `load` returns it, perhaps with other params.
    path: the file to write. With a format it is a safetensors file, unless its
      suffix is one of PyTorch's (`.pth`, `.pt`, `.bin`): then `torch.load`
      reads it; or `.npz`: then `numpy.load`.
    format: a name in `convert.FORMATS`; None: ours.
    half: whether a file of our format holds float16, half of float32, as which
      it reads back.

  Raises:
    ValueError: the format has no names for the model, or isn't ours and half
      precision is asked for; `.npz` without a format; weights that float16
      can't hold.
  """
  path = pathlib.Path(path)
  if format is None:
    if path.suffix.lower() == ".npz":
      raise ValueError(
        f"{path.name}: a .npz can't say of which model it is; write another"
        " suffix, or name a format"
      )
    bundles.write(bundle, path, half)
    return
  if half:
    raise ValueError(f"only our own format has half=True, not {format}")
  state = state_dict.to_state_dict(bundle, format)
  if path.suffix.lower() in _TORCH:
    torch_file.write(path, state)
  else:
    bundles.write_tensors(state, path, {"format": "pt"})
