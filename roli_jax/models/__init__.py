"""Backbones under one interface: images in [0, 1] to pooled features."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from roli_jax import specs
from roli_jax.models import heads
from roli_jax.models.coatnet import Coatnet
from roli_jax.models.convnext import ConvNext
from roli_jax.models.families import FAMILIES, Family, Sizes
from roli_jax.models.heads import linear as linear_head
from roli_jax.models.hooks import Hooks
from roli_jax.models.layers import ACTS, ATTENTIONS
from roli_jax.models.mobile import MobileNet
from roli_jax.models.model import INTERPOLATIONS, Model
from roli_jax.models.preact import PreactResNet, WideResNet
from roli_jax.models.resnet import ResNet
from roli_jax.models.swin import Swin
from roli_jax.models.text import Text
from roli_jax.models.vit import POOLS, Vit
from roli_jax.models.xcit import Xcit
from roli_jax.models.zoo import MODELS, Entry

# What `create` may be told of a family's sizes.
SIZES = ("patch", "width", "depth", "heads")
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def create(
  name: str,
  num_classes: int,
  image_size: int | None = None,
  *,
  hooks: Hooks = Hooks(),
  head_init: str = "kaiming_fan_out",
  patch: int | None = None,
  width: int | Sequence[int] | None = None,
  depth: int | Sequence[int] | None = None,
  heads: int | Sequence[int] | None = None,
  channels: int | None = None,
  **options: Any,
) -> Model:
  """The model of that name with a linear head.

  A name of `MODELS` has sizes of its own. One of `FAMILIES` (`vit`, `swin`,
  `convnext`, `wrn`, `dm_wrn`) takes its sizes here, and lists those that lack.

  Args:
    name: one of `MODELS` or `FAMILIES`.
    num_classes: the head's width, >= 2.
    image_size: the side in pixels that images are resized to inside the model;
      None: the one that its family was trained with. A `vit` and a `swin` must
      be told.
    hooks: where a method enters the backbone.
    head_init: the head's random start, see `heads.linear`.
    patch: side of a patch in pixels, of a `vit`, `swin` or `convnext`; divides
      `image_size`.
    width: of a `vit` that of a token, of a `swin` that of its first stage, of a
      `convnext` that of each stage; of a `wrn` the factor of its widths.
    depth: the number of blocks of a `vit`, or of each stage; of a `wrn` that of
      its layers, 6 n + 4.
    heads: the number of heads of a `vit`, or of each stage of a `swin`; divides
      the width.
    channels: of an image; default 3. Mean and standard deviation of other than
      3 are 0.5 for each.
    **options: see `with_options`.

  Raises:
    ValueError: an unknown name, a size that lacks or that the name doesn't
      take, or a value out of its range.
  """
  told = {"patch": patch, "width": width, "depth": depth, "heads": heads}
  entry = _entry(name, _given(told), channels)
  mean, std = entry.normalisation
  side = image_size or entry.image_size
  if side is None:
    raise ValueError(f"{name} takes image_size too, the side of its images")
  model = Model(
    name=name,
    backbone=entry.backbone(hooks=hooks),
    head=linear_head(num_classes, head_init),
    num_classes=num_classes,
    image_size=side,
    mean=mean,
    std=std,
  )
  return with_options(model, **options)


def _entry(name: str, sizes: Sizes, channels: int | None) -> Entry:
  """The entry of a named model, or that of these sizes in a family."""
  known: dict[str, Entry | Family] = {**MODELS, **FAMILIES}
  found = specs.lookup(known, name, "model")
  if isinstance(found, Family):
    normalisation = found.normalisation(3 if channels is None else channels)
    return Entry(found.backbone(sizes), normalisation, found.image_size)
  if told := [*sizes, *["channels"] * (channels is not None)]:
    raise _refusal(name, told)
  return found


def _refusal(name: str, told: Iterable[str]) -> ValueError:
  """What is wrong with sizes that a named model is told."""
  return ValueError(
    f"{name} has its sizes, and takes no {', '.join(told)}; those that do are"
    f" {', '.join(FAMILIES)}"
  )


def with_options(
  model: Model,
  *,
  dtype: str | None = None,
  interpolation: str | None = None,
  updates_stats: bool | None = None,
  attention: str | None = None,
  pool: str | None = None,
  act: str | None = None,
  norm_eps: float | None = None,
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
    act: the activation of a ViT, an XCiT or a residual network: `relu`, `gelu`,
      `silu` or `quick_gelu`.
    norm_eps: what normalisations add to variances, > 0; of all but a ConvNeXt,
      of an XCiT those of layers.
    drop_path: the last block's rate of stochastic depth in training, in
      [0, 1), in a ViT, Swin, ConvNeXt or XCiT.
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
    (act, ACTS, "act"),
  ):
    if word is not None:
      specs.lookup(dict.fromkeys(known), word, what)
  if drop_path is not None and not 0 <= drop_path < 1:
    raise ValueError(f"drop_path is a share in [0, 1), got {drop_path}")
  if norm_eps is not None and not norm_eps > 0:
    raise ValueError(f"norm_eps must be > 0, got {norm_eps}")
  for_model = {
    "dtype": dtype,
    "interpolation": interpolation,
    "updates_stats": updates_stats,
  }
  for_backbone = {
    "attention": attention,
    "pool": pool,
    "act": None if act is None else ACTS[act],
    "eps": norm_eps,
    "drop_path": drop_path,
    "scan": scan,
    "remat": remat,
  }
  chosen = _given(for_backbone)
  for option in chosen:
    if not hasattr(model.backbone, option):
      name = {"eps": "norm_eps"}.get(option, option)
      raise ValueError(f"{model.name} has no option {name!r}")
  if pool == "token" and not model.backbone.cls:
    raise ValueError(f"this {model.name} has no class token: pool=mean")
  if pool == "mean" and model.backbone.distilled:
    raise ValueError(f"this {model.name} has two class tokens: pool=token")
  backbone = model.backbone.clone(**chosen) if chosen else model.backbone
  return dataclasses.replace(model, backbone=backbone, **_given(for_model))


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
  """The options that are not None."""
  return {name: value for name, value in options.items() if value is not None}


def sizes(model: Model) -> dict[str, Any]:
  """What `create` was told of its sizes; of a named model {}."""
  if model.name not in FAMILIES:
    return {}
  return FAMILIES[model.name].sizes(model.backbone)


def check_sizes(model: Model, told: Sizes, what: str) -> None:
  """Raises a ValueError unless the model, of these weights, has these sizes.

  Args:
    model: any model.
    told: some sizes of a family, or `channels`, by name; {} for a named model.
    what: the name of the weights, for the message.
  """
  if told and model.name not in FAMILIES:
    raise _refusal(model.name, told)
  have = {**sizes(model), "channels": model.channels}
  for name, value in told.items():
    wanted = tuple(value) if isinstance(value, list | tuple) else value
    if have.get(name) != wanted:
      raise ValueError(
        f"{what} is a {model.name} of {name}={have.get(name)}, not {wanted}"
      )


_FIELDS = ("name", "num_classes", "image_size", "mean", "std")
# What names of backbones don't tell, by the attribute that holds it.
_SHOWN_FIELDS = (
  "pool", "cls", "fc_norm", "distilled", "registers", "cls_positions", "scaled",
  "window",
)  # fmt: skip
_OTHER_FIELDS = {"act": "act", "eps": "norm_eps"}


def to_spec(model: Model) -> dict[str, Any]:
  """Describes a model in plain JSON, from which `from_spec` makes it again.

  Options of its computation, such as `dtype` and `scan`, are left out.

  Raises:
    ValueError: an activation that has no name.
  """
  about = {field: getattr(model, field) for field in _FIELDS}
  about |= {"interpolation": model.interpolation, **sizes(model)}
  named = _entry(model.name, sizes(model), None).backbone()
  for field in (*_SHOWN_FIELDS, *_OTHER_FIELDS):
    value = getattr(model.backbone, field, None)
    if value != getattr(named, field, None):
      about[_OTHER_FIELDS.get(field, field)] = value
  if "act" in about:
    names = [name for name, act in ACTS.items() if act == about["act"]]
    if not names:
      raise ValueError(f"{about['act']} is none of {', '.join(ACTS)}")
    (about["act"],) = names
  if isinstance(model.head, heads.Cosine):
    return {**about, "head_embed": model.head.embed}
  if isinstance(model.head, heads.Pair):
    return {**about, "head_pair": True}
  return {**about, "head_bias": model.head.use_bias}


def from_spec(about: Mapping[str, Any]) -> Model:
  """The model that `to_spec` described, with the default computation.

  Args:
    about: `name`, `num_classes`, `image_size`, `mean` and `std`; of a family
      its sizes; and, each with a default, `interpolation`, `head_embed`,
      `head_pair` or `head_bias`, `act`, `norm_eps`, what ViTs differ in, and a
      Swin's `window`.
  """
  num_classes = about["num_classes"]
  names = (*SIZES, *_OTHER_FIELDS.values())
  told = {name: about[name] for name in names if name in about}
  model = create(about["name"], num_classes, about["image_size"], **told)
  if "head_embed" in about:
    head: Any = heads.cosine(num_classes, about["head_embed"])
    model = dataclasses.replace(model, head=head)
  elif "head_pair" in about:
    model = dataclasses.replace(model, head=heads.Pair(num_classes))
  elif not about.get("head_bias", True):
    model = dataclasses.replace(model, head=heads.projection(num_classes))
  chosen = {field: about[field] for field in _SHOWN_FIELDS if field in about}
  if chosen:
    model = dataclasses.replace(model, backbone=model.backbone.clone(**chosen))
  return dataclasses.replace(
    model,
    mean=tuple(about["mean"]),
    std=tuple(about["std"]),
    interpolation=about.get("interpolation", "bilinear"),
  )


__all__ = [
  "FAMILIES",
  "MODELS",
  "POOLS",
  "SIZES",
  "Coatnet",
  "ConvNext",
  "Entry",
  "Hooks",
  "MobileNet",
  "Model",
  "PreactResNet",
  "ResNet",
  "Swin",
  "Text",
  "Vit",
  "WideResNet",
  "Xcit",
  "check_sizes",
  "create",
  "from_spec",
  "heads",
  "sizes",
  "to_spec",
  "with_options",
]
