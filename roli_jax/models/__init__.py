"""Backbones under one interface: images in [0, 1] to pooled features."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

from roli_jax import specs
from roli_jax.models import heads
from roli_jax.models.model import Model
from roli_jax.models.seams import Seams
from roli_jax.models.vit import Vit


@dataclasses.dataclass(frozen=True)
class Entry:
  """A named backbone, and how its family wants its images by default."""

  backbone: Callable[..., nn.Module]
  image_size: int
  channels: int = 3
  mean: tuple[float, ...] = (0.485, 0.456, 0.406)
  std: tuple[float, ...] = (0.229, 0.224, 0.225)


MODELS: dict[str, Entry] = {
  # The embedded one: 16 tokens of an 8 x 8 image. Mean and standard
  # deviation are those of the rendered letters.
  "glyph_vit": Entry(
    functools.partial(Vit, patch=2, width=64, depth=4, num_heads=4, hidden=256),
    image_size=8,
    channels=1,
    mean=(0.35,),
    std=(0.39,),
  ),
}


def create(
  name: str,
  num_classes: int,
  image_size: int | None = None,
  seams: Seams = Seams(),
  head_init: str = "kaiming_fan_out",
) -> Model:
  """The model of that name with a linear head.

  Args:
    name: one of `MODELS`.
    num_classes: the head's width.
    image_size: the side that images are resized to inside the model; None
      stands for the family's own.
    seams: where a method enters the backbone.
    head_init: the head's random start, see `heads.linear`.
  """
  entry = specs.choose(MODELS, name, "model")
  return Model(
    name=name,
    backbone=entry.backbone(seams=seams),
    head=heads.linear(num_classes, head_init),
    num_classes=num_classes,
    image_size=image_size or entry.image_size,
    channels=entry.channels,
    mean=entry.mean,
    std=entry.std,
  )


def describe(model: Model) -> dict[str, Any]:
  """What `described` makes the model from again; plain JSON."""
  kept = ("name", "num_classes", "image_size", "mean", "std")
  return {field: getattr(model, field) for field in kept}


def described(about: Mapping[str, Any]) -> Model:
  """The model that `describe` described, under a linear head."""
  model = create(about["name"], about["num_classes"], about["image_size"])
  mean, std = tuple(about["mean"]), tuple(about["std"])
  return dataclasses.replace(model, mean=mean, std=std)


__all__ = [
  "MODELS",
  "Entry",
  "Model",
  "Seams",
  "Vit",
  "create",
  "describe",
  "described",
  "heads",
]
