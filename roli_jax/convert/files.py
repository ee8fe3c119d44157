"""Weights from files of any kind, and into them."""

import dataclasses
import importlib.resources
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from roli_jax import models
from roli_jax.convert import bundle as bundles
from roli_jax.convert import (
  kinds,
  naming,
  networks,
  plain,
  state_dict,
  text,
  torch_file,
)
from roli_jax.convert.bundle import Bundle
from roli_jax.files import checkpoint
from roli_jax.types import PyTree

_TORCH = (".pth", ".pt", ".th", ".bin", ".ckpt", ".tar")


def shipped(model: str) -> dict[str, pathlib.Path]:
  """Returns the weights of a model that come with the package, by name."""
  folder = pathlib.Path(str(importlib.resources.files("roli_jax"))) / "weights"
  files = sorted(folder.glob(f"{model}_*.safetensors"))
  return {file.stem.removeprefix(f"{model}_"): file for file in files}


def find(model: str, weights: str, hint: str = "") -> pathlib.Path:
  """Returns the file that a config means by a model and its weights.

  Args:
    model: a name in `models.MODELS` or `models.FAMILIES`.
    weights: the name of shipped weights (`robust`), or a path.
    hint: how to get the weights, for the message; "" for none.

  Raises:
    ValueError: there are no such weights; the message lists those there are.
  """
  names = shipped(model)
  if weights in names:
    return names[weights]
  path = pathlib.Path(weights).expanduser()
  if weights and path.exists():
    inside = path / f"{model}.safetensors"  # as --mode=convert writes it
    return inside if inside.exists() else path
  shipped_ones = f"; {model} comes with {', '.join(names)}" if names else ""
  how = f"; {hint}" if hint else ""
  raise ValueError(f"no weights of {model} at {weights!r}{shipped_ones}{how}")


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
) -> Bundle:
  """Returns the bundle of a file, ours or another framework's.

  What names and shapes don't determine is assumed; a warning and
  `bundle.coverage.notes()` list the assumptions, and the other networks that
  the file holds.

  Args:
    source: a safetensors file, ours or not, a PyTorch checkpoint or a .npz,
      which are recognised by their content; a directory that holds our bundle,
      or a checkpoint of one of our runs; or a state dict: names to arrays,
      perhaps in dicts and lists.
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
    act: the activation of a ViT or a residual network, as of
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

  Raises:
    ValueError: the file can't be read, or is refused; its tensors are not the
      model's (both sides are listed), not floats or not finite; it holds no
      network of that key; an option that the model hasn't.
  """
  sizes = {
    "patch": patch,
    "width": width,
    "depth": depth,
    "heads": heads,
    "channels": channels,
  }
  told = {name: size for name, size in sizes.items() if size is not None}
  found: Any = source
  what = "the state dict"
  if isinstance(source, str | pathlib.Path):
    path = pathlib.Path(source).expanduser()
    found, what = opened(path), str(path)
  if not isinstance(found, Bundle):
    bundle = state_dict.to_bundle(
      found, model, format, mean, std, num_classes, image_size, pool, key, what,
      **told,
    )  # fmt: skip
    assert bundle.coverage is not None
    for note in bundle.coverage.notes():
      logging.warning("%s: %s", what, note)
    computed = models.with_options(bundle.model, act=act, norm_eps=norm_eps)
    return dataclasses.replace(bundle, model=computed)
  if model not in (None, found.model.name):
    raise ValueError(f"{what} is a {found.model.name}, not a {model}")
  models.check_sizes(found.model, told, what)
  return adjusted(
    found, mean, std, num_classes, image_size, pool, key, act, norm_eps
  )


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
  found = opened(pathlib.Path(path).expanduser())
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
  found = opened(path)
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
  bundle = dataclasses.replace(found, model=model)
  return bundles.fitted(bundle, mean, std, num_classes, image_size)[0]


def opened(path: pathlib.Path) -> Bundle | Any:
  """Returns our bundle, or the checkpoint of another framework, of a file.

  Raises:
    ValueError: the file can't be read, or is refused.
  """
  if not path.exists():
    raise ValueError(f"there are no weights at {path}")
  if path.is_dir():
    return _from_directory(path)
  kind = kinds.of(path)
  if kind == "torch":
    return torch_file.read(path)
  if kind == "npz":
    return plain.npz(path)
  tensors, metadata = plain.safetensors(path)
  if metadata.get("format") == bundles.FORMAT:
    return bundles.from_tensors(tensors, metadata, str(path))
  return tensors


def _from_directory(path: pathlib.Path) -> Bundle | Any:
  """Returns a directory's bundle, or the best checkpoint of a run's stage."""
  files = sorted(path.glob("*.safetensors"))
  # What a method has added may lie beside the model that it is for.
  known = models.MODELS.keys() | models.FAMILIES.keys()
  files = [file for file in files if file.stem in known] or files
  if len(files) == 1:
    return opened(files[0])
  return from_stage(path, _plain, files)


def _plain(model: models.Model, meta: Mapping[str, Any]) -> models.Model:
  """Returns the model, if no method has added anything to its checkpoint."""
  if not meta["adds"]:
    return model
  raise ValueError(
    f"the checkpoint is of {meta['method']['name']}, which has added to its"
    " backbone; --mode=convert with it as --config.source folds LoRA into the"
    " kernels, and writes adapters and prompts beside the bare backbone"
  )


def from_stage(
  path: pathlib.Path,
  enter: Callable[[models.Model, Mapping[str, Any]], models.Model],
  files: Sequence[pathlib.Path] = (),
) -> Bundle:
  """Returns the checkpoint in a directory: of a step, or a stage's best.

  Args:
    path: the directory of a step or stage, or one above a single stage.
    enter: returns the model with what its method adds, from the plain model
      and the checkpoint's metadata.
    files: the files of weights in the directory, for the message.

  Raises:
    ValueError: there isn't one stage; leaves that are not the model's.
  """
  stages = checkpoint.find(path)
  if checkpoint.step_of(path) is not None:
    stages = [path.parent]
  if len(stages) != 1:
    if not (files or stages):
      kinds.refuse_directory(path)
    have = ", ".join(str(p) for p in (files or stages)[:4]) or "neither"
    raise ValueError(
      f"expected one .safetensors file in {path}, or the checkpoints of one"
      f" stage; there is {have}"
    )
  with checkpoint.manager(stages[0], reading=True) as checkpoints:
    step = checkpoint.step_of(path)
    step = checkpoints.best_step() if step is None else step
    meta = checkpoint.restore_meta(checkpoints, step)
    model = enter(models.from_spec(meta["model"]), meta)
    like = jax.eval_shape(model.init, jax.random.key(0))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like
    )
    restored = checkpoint.restore(checkpoints, step, model=like)["model"]
  params, stats = jax.tree.map(np.asarray, restored)
  bundle = Bundle(model, params, stats)
  bundles.check(bundle, str(path))
  return bundle


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
      reads it.
    format: a name in `convert.FORMATS`; None: ours.
    half: whether a file of our format holds float16, half of float32, as which
      it reads back.

  Raises:
    ValueError: the format has no names for the model, or isn't ours and half
      precision is asked for; weights that float16 can't hold.
  """
  path = pathlib.Path(path)
  if format is None:
    bundles.write(bundle, path, half)
    return
  if half:
    raise ValueError(f"only our own format has half=True, not {format}")
  state = state_dict.to_state_dict(bundle, format)
  if path.suffix.lower() in _TORCH:
    torch_file.write(path, state)
  else:
    bundles.write_tensors(state, path, {"format": "pt"})
