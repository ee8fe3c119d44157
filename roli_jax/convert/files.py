"""Weights from files of any kind, and into them."""

import dataclasses
import importlib.resources
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from roli_jax import models, trees
from roli_jax.convert import bundle as bundles
from roli_jax.convert import (
  kinds,
  networks,
  plain,
  resample,
  state_dict,
  text,
  torch_file,
)
from roli_jax.convert.bundle import Bundle
from roli_jax.files import checkpoint
from roli_jax.types import PyTree

_TORCH = (".pth", ".pt", ".th", ".bin", ".ckpt", ".tar")


def shipped(model: str) -> dict[str, pathlib.Path]:
  """The weights of this model that come with the package, by name."""
  folder = pathlib.Path(str(importlib.resources.files("roli_jax"))) / "weights"
  files = sorted(folder.glob(f"{model}_*.safetensors"))
  return {file.stem.removeprefix(f"{model}_"): file for file in files}


def find(model: str, weights: str, hint: str = "") -> pathlib.Path:
  """The file that a config means by a model and its weights.

  Args:
    model: a name in `models.MODELS`.
    weights: the name of shipped weights (`robust`), or a path.
    hint: how to get them, for the message.

  Raises:
    ValueError: neither; the message says which there are.
  """
  names = shipped(model)
  if weights in names:
    return names[weights]
  path = pathlib.Path(weights).expanduser()
  if weights and path.exists():
    inside = path / f"{model}.safetensors"  # as --mode=convert writes it
    return inside if inside.exists() else path
  known = f"; {model} comes with {', '.join(names)}" if names else ""
  how = f"; {hint}" if hint else ""
  raise ValueError(f"no weights of {model} at {weights!r}{known}{how}")


def load(
  source: str | pathlib.Path | Mapping[str, Any] | list | tuple,
  model: str | None = None,
  format: str | None = None,
  mean: Sequence[float | int] | None = None,
  std: Sequence[float | int] | None = None,
  num_classes: int | None = None,
  image_size: int | None = None,
  *,
  pool: str | None = None,
  key: str | None = None,
) -> Bundle:
  """The bundle of a file, ours or another framework's.

  What names and shapes don't tell is assumed; a warning and
  `bundle.coverage.notes()` say what, and which other networks the file holds.

  Args:
    source: a safetensors file, ours or not; a PyTorch checkpoint; a .npz; all
      of them told by content, under any name; a directory that holds our
      bundle, or a checkpoint of one of our runs; or a state dict: names to
      arrays, perhaps in dicts and lists.
    model: a name in `models.MODELS`; None: told from shapes.
    format: a name in `convert.FORMATS`; None: told from names. Of ours it says
      nothing.
    mean: per channel; None: the file's own, or else the format's.
    std: what the pixels are divided by; None: the format's own.
    num_classes: None keeps the file's classifier; a number drops it and puts a
      zero head of that width.
    image_size: the side that images are resized to inside the model; another
      one than the weights' resamples their positions. None: the weights'.
    pool: of a ViT, what its feature is: `token`, the class token, or `mean`,
      the mean of the others. None: what the names tell, else `token`.
    key: which network of a checkpoint: its dotted path, or a part of it, as
      `ema`. None: an averaged one, else the model, else the first whose names
      are known.

  Raises:
    ValueError: the file can't be read, or is refused; its tensors are not the
      model's (both sides are listed), not floats or not finite; it holds no
      network of that key.
  """
  found: Any = source
  what = "the state dict"
  if isinstance(source, str | pathlib.Path):
    path = pathlib.Path(source).expanduser()
    found, what = opened(path), str(path)
  if not isinstance(found, Bundle):
    bundle = state_dict.to_bundle(
      found, model, format, mean, std, num_classes, image_size, pool, key, what
    )
    assert bundle.coverage is not None
    for note in bundle.coverage.notes():
      logging.warning("%s: %s", what, note)
    return bundle
  if model not in (None, found.model.name):
    raise ValueError(f"{what} is a {found.model.name}, not a {model}")
  return adjusted(found, mean, std, num_classes, image_size, pool, key)


def read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of any file that is read at all, as they are.

  Args:
    path: as `source` of `load`.

  Returns:
    Arrays by their names in the file, dotted where dicts are in dicts: of
    `{"model": {"fc.bias": ...}}` `model.fc.bias`. Of a bundle of ours its
    leaves by their paths.

  Raises:
    ValueError: the file can't be read, or is refused.
  """
  found = opened(pathlib.Path(path).expanduser())
  if isinstance(found, Bundle):
    return trees.paths(
      {
        "backbone": found.params.backbone,
        "head": found.params.head,
        "stats": found.stats,
      }
    )
  return networks.arrays(found)


def text_tower(
  source: str | pathlib.Path | Mapping[str, Any],
  num_heads: int | None = None,
  act: str = "gelu",
) -> tuple[models.Text, PyTree]:
  """The text tower in a CLIP's file, and its parameters.

  What `load` leaves of an open_clip file, `logit_scale` included. Texts for it
  are made by `tokenizer.Tokenizer`.

  Args:
    source: a safetensors file or a PyTorch checkpoint with open_clip's names,
      or a state dict.
    num_heads: which no file says; None: its width / 64, as in every CLIP.
    act: `gelu`, or `quick_gelu` where OpenAI's own weights are in the file or
      were what training began with; a file does not say.

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
) -> Bundle:
  """A bundle of ours with what `load` is asked for."""
  if key is not None:
    raise ValueError(
      f"there is no network {key!r}: these weights are ours, of one alone"
    )
  about, params = models.with_options(found.model, pool=pool), found.params
  about = dataclasses.replace(
    about,
    mean=state_dict.each_channel(mean, about.mean, "mean"),
    std=state_dict.each_channel(std, about.std, "std"),
  )
  if image_size is not None:
    about, params, _ = resample.to_size(about, params, image_size)
  if num_classes is not None:
    about = bundles.with_classes(about, num_classes)
    params = dataclasses.replace(params, head=bundles.zero_head(about))
  return dataclasses.replace(found, model=about, params=params)


def opened(path: pathlib.Path) -> Bundle | Any:
  """What a file holds: our bundle, or a checkpoint of another framework.

  Raises:
    ValueError: it can't be read, or is refused.
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
  """A bundle's file in it, or the best checkpoint of a stage of a run."""
  files = sorted(path.glob("*.safetensors"))
  # What a method has added may lie beside the model that it is for.
  files = [file for file in files if file.stem in models.MODELS] or files
  if len(files) == 1:
    return opened(files[0])
  return from_stage(path, _plain, files)


def _plain(model: models.Model, meta: Mapping[str, Any]) -> models.Model:
  """The model of a checkpoint to which no method has added anything."""
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
  """The checkpoint that a directory means: of a step, or a stage's best.

  Args:
    path: the directory of a step or stage, or one above a single stage.
    enter: the model with what its method adds, from the plain one and what the
      checkpoint says.
    files: what is there instead, for the message.
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
  bundle: Bundle, path: str | pathlib.Path, format: str | None = None
) -> None:
  """Writes the bundle, or its state dict in another format.

  Args:
    bundle: what `load` gave, perhaps with other params.
    path: the file to write. With a format, `.safetensors`, or one of PyTorch's
      (`.pth`, `.pt`, `.bin`), which `torch.load` reads.
    format: a name in `convert.FORMATS`; None: ours.

  Raises:
    ValueError: the format has no names for the model.
  """
  path = pathlib.Path(path)
  if format is None:
    bundles.write(bundle, path)
    return
  state = state_dict.to_state_dict(bundle, format)
  if path.suffix.lower() in _TORCH:
    torch_file.write(path, state)
  else:
    bundles.write_tensors(state, path, {"format": "pt"})
