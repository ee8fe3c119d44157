"""What a file or directory holds: a bundle of ours, or another's checkpoint."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from roli_jax import models
from roli_jax.convert import bundle as bundles
from roli_jax.convert import kinds, plain, torch_file
from roli_jax.convert.bundle import Bundle
from roli_jax.files import checkpoint


def of(path: pathlib.Path) -> Bundle | Any:
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
    return of(files[0])
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
    like = model.shapes()
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like
    )
    restored = checkpoint.restore(checkpoints, step, model=like)["model"]
  params, stats = jax.tree.map(np.asarray, restored)
  bundle = Bundle(model, params, stats)
  bundles.check(bundle, str(path))
  return bundle
