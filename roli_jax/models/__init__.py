"""Backbones under one interface: images in [0, 1] to pooled features."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from roli_jax import specs
from roli_jax.models import heads
from roli_jax.models.convnext import ConvNext
from roli_jax.models.hooks import Hooks
from roli_jax.models.layers import ATTENTIONS
from roli_jax.models.model import INTERPOLATIONS, Model
from roli_jax.models.resnet import ResNet, WideResNet
from roli_jax.models.swin import Swin
from roli_jax.models.text import Text
from roli_jax.models.vit import POOLS, Vit
from roli_jax.models.zoo import MODELS, Entry

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def create(
  name: str,
  num_classes: int,
  image_size: int | None = None,
  *,
  hooks: Hooks = Hooks(),
  head_init: str = "kaiming_fan_out",
  **options: Any,
) -> Model:
  """The model of that name with a linear head.

  Args:
    name: one of `MODELS`.
    num_classes: the head's width, >= 2.
    image_size: the side in pixels that images are resized to inside the model;
      None: the one that its family was trained with.
    hooks: where a method enters the backbone.
    head_init: the head's random start, see `heads.linear`.
    **options: see `with_options`.

  Raises:
    ValueError: an unknown name, or a value out of its range.
  """
  entry = specs.lookup(MODELS, name, "model")
  mean, std = entry.normalisation
  model = Model(
    name=name,
    backbone=entry.backbone(hooks=hooks),
    head=heads.linear(num_classes, head_init),
    num_classes=num_classes,
    image_size=image_size or entry.image_size,
    mean=mean,
    std=std,
  )
  return with_options(model, **options)


def with_options(
  model: Model,
  *,
  dtype: str | None = None,
  interpolation: str | None = None,
  updates_stats: bool | None = None,
  attention: str | None = None,
  pool: str | None = None,
  drop_path: float | int | None = None,
  scan: bool | None = None,
  remat: bool | None = None,
) -> Model:
  """The model computed otherwise: its leaves, their names and shapes stay.

  Args:
    model: any model; None for an option leaves it as it is.
    dtype: the backbone's precision: `float32`, `bfloat16`, `float16` or
      `float64`; see `Model`.
    interpolation: `bilinear` or `bicubic`, for the resizing inside the model.
    updates_stats: see `Model`.
    attention: a ViT's or Swin's: `plain`; `looped`, one head after another, for
      TPUs. Of a ViT also `xla`, JAX's; `fused`, on an NVIDIA GPU and in half
      precision, which is differentiable once.
    pool: a ViT's feature: `token`, the class token; `mean`, the mean of the
      other tokens.
    drop_path: the last block's rate of stochastic depth in training, in
      [0, 1), in a ViT, Swin or ConvNeXt.
    scan: whether equal blocks are one loop: compiles faster.
    remat: whether activations are computed again for gradients: less memory.

  Raises:
    ValueError: an unknown word, or an option that the backbone hasn't.
  """
  for word, known, what in (
    (dtype, _DTYPES, "dtype"),
    (interpolation, INTERPOLATIONS, "interpolation"),
    (
      attention,
      getattr(model.backbone, "attentions", ATTENTIONS),
      f"attention of {model.name}",
    ),
    (pool, POOLS, "pool"),
  ):
    if word is not None:
      specs.lookup(dict.fromkeys(known), word, what)
  if drop_path is not None and not 0 <= drop_path < 1:
    raise ValueError(f"drop_path is a share in [0, 1), got {drop_path}")
  for_model = {
    "dtype": dtype,
    "interpolation": interpolation,
    "updates_stats": updates_stats,
  }
  for_backbone = {
    "attention": attention,
    "pool": pool,
    "drop_path": drop_path,
    "scan": scan,
    "remat": remat,
  }
  chosen = _given(for_backbone)
  for option in chosen:
    if not hasattr(model.backbone, option):
      raise ValueError(f"{model.name} has no option {option!r}")
  if pool == "token" and not model.backbone.cls:
    raise ValueError(f"this {model.name} has no class token: pool=mean")
  backbone = model.backbone.clone(**chosen) if chosen else model.backbone
  return dataclasses.replace(model, backbone=backbone, **_given(for_model))


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
  """The options that are not None."""
  return {name: value for name, value in options.items() if value is not None}


_FIELDS = ("name", "num_classes", "image_size", "mean", "std")
_VIT_FIELDS = ("pool", "cls", "fc_norm")


def to_spec(model: Model) -> dict[str, Any]:
  """Describes a model in plain JSON, from which `from_spec` makes it again.

  Options of its computation, such as `dtype` and `scan`, are left out.
  """
  about = {field: getattr(model, field) for field in _FIELDS}
  about["interpolation"] = model.interpolation
  if isinstance(model.backbone, Vit):
    named = MODELS[model.name].backbone()
    about |= {
      field: value
      for field in _VIT_FIELDS
      if (value := getattr(model.backbone, field)) != getattr(named, field)
    }
  if isinstance(model.head, heads.Cosine):
    return {**about, "head_embed": model.head.embed}
  return {**about, "head_bias": model.head.use_bias}


def from_spec(about: Mapping[str, Any]) -> Model:
  """The model that `to_spec` described, with the default computation.

  Args:
    about: `name`, `num_classes`, `image_size`, `mean` and `std`; and, each with
      a default, `interpolation`, `head_embed` or `head_bias`, and a ViT's
      `pool`, `cls` and `fc_norm`.
  """
  num_classes = about["num_classes"]
  model = create(about["name"], num_classes, about["image_size"])
  if "head_embed" in about:
    head: Any = heads.cosine(num_classes, about["head_embed"])
    model = dataclasses.replace(model, head=head)
  elif not about.get("head_bias", True):
    model = dataclasses.replace(model, head=heads.projection(num_classes))
  chosen = {field: about[field] for field in _VIT_FIELDS if field in about}
  if chosen:
    model = dataclasses.replace(model, backbone=model.backbone.clone(**chosen))
  return dataclasses.replace(
    model,
    mean=tuple(about["mean"]),
    std=tuple(about["std"]),
    interpolation=about.get("interpolation", "bilinear"),
  )


__all__ = [
  "MODELS",
  "POOLS",
  "ConvNext",
  "Entry",
  "Hooks",
  "Model",
  "ResNet",
  "Swin",
  "Text",
  "Vit",
  "WideResNet",
  "create",
  "from_spec",
  "heads",
  "to_spec",
  "with_options",
]
