"""Published weights by name: what their names bring, and what is checked."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from roli_jax.convert import bundle as bundles
from roli_jax.convert import origins, state_dict
from roli_jax.convert.bundle import Bundle
from roli_jax.convert.registry import Checkpoint

# What a file may hold too, and is then compared.
_NORMALISATION = ("mean", "std")
_POOLS = {"token": "token", "avg": "mean"}  # timm's words, and ours


def find(checkpoint: Checkpoint) -> pathlib.Path:
  """Returns the file of published weights.

  Raises:
    ValueError: they are no model of ours, or not here.
  """
  if reason := checkpoint.why_not():
    raise ValueError(f"{checkpoint.name} can't be loaded: {reason}")
  return origins.find(checkpoint)


def described(checkpoint: Checkpoint, path: pathlib.Path) -> Checkpoint:
  """Returns a checkpoint of no known model with what its repository says.

  Args:
    checkpoint: any; one of the table's stays as it is.
    path: its file; timm writes mean, deviation, size and pooling beside it.
  """
  file = path.parent / origins.CONFIG
  by_hand = path == origins.place(checkpoint)
  if checkpoint.model or by_hand or not file.is_file():
    return checkpoint
  config = json.loads(file.read_text(encoding="utf-8"))
  about = {**config, **config.get("pretrained_cfg", {})}
  facts: dict[str, Any] = {
    k: tuple(about[k]) for k in _NORMALISATION if k in about
  }
  if "input_size" in about:
    facts["image_size"] = about["input_size"][-1]
  if about.get("architecture", "").startswith(("vit_", "deit")):
    facts["pool"] = _POOLS.get(about.get("global_pool", ""))
  return dataclasses.replace(checkpoint, **facts)


def arguments(
  checkpoint: Checkpoint, told: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the arguments of `convert.load` but for mean and deviation.

  Args:
    checkpoint: whose facts they are.
    told: those that the user gives, which go before.

  Raises:
    ValueError: another model or network than the name's.
  """
  facts = {k: v for k, v in checkpoint.facts.items() if v is not None}
  for fact in {"model", "key"} & facts.keys() & told.keys():
    if told[fact] != facts[fact]:
      raise ValueError(
        f"{checkpoint.name} has {fact}={facts[fact]}, not {told[fact]}"
      )
  for fact in _NORMALISATION:
    facts.pop(fact, None)
  return {**facts, **told}


def checked(
  bundle: Bundle, checkpoint: Checkpoint, told: Mapping[str, Any]
) -> Bundle:
  """Returns the bundle with the name's normalisation, if nobody tells another.

  Args:
    bundle: as it was read with `arguments`.
    checkpoint: what it is to be.
    told: the arguments that the user gives.

  Raises:
    ValueError: a head of other classes, a normalisation in the file or
      positions that are not the name's.
  """
  model, about = bundle.model, bundle.coverage
  both = {
    k: getattr(checkpoint, k)
    for k in _NORMALISATION
    if k not in told and getattr(checkpoint, k) is not None
  }
  compared: dict[str, tuple[Any, Any]] = {}
  if checkpoint.classes and "num_classes" not in told:
    compared["classes"] = model.num_classes, checkpoint.classes
  if about and about.normalised_by == state_dict.OF_FILE:
    compared |= {k: (getattr(model, k), both[k]) for k in both}
  if about and "image_size" not in told:
    compared["tensors for another image_size"] = len(about.resampled), 0
  for fact, (found, wanted) in compared.items():
    if not np.allclose(found, wanted, atol=1e-3):
      raise ValueError(
        f"{checkpoint.name}: its file has {fact} {found}, and not {wanted}"
      )
  # What a line of the table leaves out is the model's own; but of a file whose
  # model it doesn't know it tells nothing.
  untold = set(bundle.assumed) - set(both)
  if checkpoint.model:
    untold &= set(_NORMALISATION)
  assumed = {k: v for k, v in bundle.assumed.items() if k in untold}
  bundle = dataclasses.replace(bundle, assumed=assumed)
  return bundles.fitted(bundle, both.get("mean"), both.get("std"), None, None)[
    0
  ]
