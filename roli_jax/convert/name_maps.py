"""What other formats call our leaves: one table a family, read both ways.

A rule is a pair: a pattern that matches the beginning of a leaf's path, up to a
slash or the end, and the foreign name of that. The first that matches counts;
what follows keeps its name, with dots. A last part `kernel` or `scale` is
PyTorch's `weight`, `mean` and `var` are `running_mean` and `running_var`.
Leaves that get the same name (q, k and v) are stacked there.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from roli_jax import models
from roli_jax.convert import (
  mobile_names,
  residual_names,
  stage_names,
  variant_names,
  vit_names,
)
from roli_jax.convert.residual_names import Rules
from roli_jax.models import zoo

T = TypeVar("T")

_TORCH = {
  "kernel": "weight",
  "scale": "weight",
  "mean": "running_mean",
  "var": "running_var",
}


_KINDS = (
  "clip", "same", "stem", "sparse", "group", "gate_norm", "eva",
  "squeeze_first",
)  # fmt: skip
_FIRST = re.compile("/(q|gate)/")  # of what is stacked
# What ViTs have in layouts that have no names for more.
_USUAL = {
  "distilled": False, "registers": 0, "scaled": False, "cls_positions": True,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Layout:
  """How some formats name and shape the tensors of a family.

  Attributes:
    name: the name of the layout, as bundles and messages have it.
    formats: the formats that use it, names in `FORMATS`.
    family: the class of the backbones.
    mark: a pattern that a key of such a file matches. A file that bears the
      marks of two layouts is of the later one.
    rules: see the module.
    dropped: patterns of keys that a file may hold beside; no pass needs them.
    plain: keys of tensors that are as ours, neither transposed nor with
      leading axes of length 1.
    kind: the attribute that tells the family's backbones from those of other
      layouts, one of `_KINDS` or none.
    pools: whether it is of timm's ViTs, which may be pooled by a mean, as names
      don't always show, and have registers and more.
    stages: of a pre-activation ResNet, how many there are; 0: any number.
    convolved: a pattern of paths whose kernels, matrices here, are convolutions
      of 1 x 1 there.
    head: what is stacked is so by head, of this many channels; 0: as a whole.
    flax: whether tensors are named and shaped as Flax does it: slashes, kernels
      as ours, those of attention by head.
  """

  name: str
  formats: tuple[str, ...]
  family: type
  mark: str
  rules: Rules
  dropped: tuple[str, ...] = ()
  plain: tuple[str, ...] = ()
  kind: str = ""
  pools: bool = False
  stages: int = 0
  convolved: str = r"(?!)"
  head: int = 0
  flax: bool = False

  @property
  def projects(self) -> bool:
    """Whether its heads are projections, as in CLIP: they have no bias."""
    return not any(re.match(rule, "head/bias") for rule, _ in self.rules)

  def holds(self, backbone: Any) -> bool:
    """Returns whether the backbone is one of the layout's."""
    kinds = (k for k in _KINDS if getattr(backbone, k, False))
    usual = all(getattr(backbone, k, v) == v for k, v in _USUAL.items())
    return (
      isinstance(backbone, self.family)
      and self.kind == next(kinds, "")
      and (usual or self.pools)
      and self.stages in (0, len(getattr(backbone, "depths", ())))
    )

  def needed(self, tensors: Mapping[str, T]) -> dict[str, T]:
    """Returns the tensors, by key, without those that no pass needs."""
    dropped = re.compile("|".join(self.dropped) or r"(?!)")
    return {k: v for k, v in tensors.items() if not dropped.fullmatch(k)}

  def key(self, path: str) -> str:
    """Returns the foreign name of a leaf, from its path.

    Raises:
      ValueError: there is none.
    """
    path = re.sub("^stats/", "backbone/", path)
    for pattern, name in self.rules:
      match = re.match(f"(?:{pattern})(?=/|$)", path)
      if match:
        rest = path[match.end() :].split("/")[1:]
        if self.flax:
          return "/".join([match.expand(name), *rest])
        rest[-1:] = [_TORCH.get(leaf, leaf) for leaf in rest[-1:]]
        # `in_proj_` and `weight` are one word.
        return ".".join([match.expand(name), *rest]).replace("_.", "_")
    raise ValueError(f"the layout {self.name} has no name for {path}")

  def keys(self, paths: Iterable[str]) -> dict[str, list[str]]:
    """Returns the paths behind each foreign key, in their order: q, k, v.

    The two of a gated MLP are a gate and what it gates.
    """
    leaves: dict[str, list[str]] = {}
    for path in paths:
      leaves.setdefault(self.key(path), []).append(path)
    for stacked in leaves.values():
      stacked.sort(key=lambda path: (not _FIRST.search(path), path))
    return leaves

  def outward(self, key: str, paths: list[str], leaves: list[Any]) -> Any:
    """Returns the foreign tensor of some leaves, which `inward` takes apart.

    Args:
      key: the foreign name.
      paths: the leaves' paths, as `keys` returns them.
      leaves: their arrays.
    """
    if self.flax:
      return _by_head(paths[0], leaves[0])
    if key in self.plain:
      shape = leaves[0].shape
      return leaves[0].reshape(shape[sum(np.cumprod(shape) == 1) :])
    if paths[0].endswith("/kernel"):
      leaves = [leaf.transpose(_TO_TORCH[leaf.ndim]) for leaf in leaves]
    tensor = self._stacked(leaves) if len(leaves) > 1 else leaves[0]
    if paths[0].endswith("/kernel") and re.search(self.convolved, paths[0]):
      tensor = tensor[..., None, None]
    return tensor

  def _stacked(self, leaves: list[Any]) -> Any:
    """Returns several leaves as one, of which `_parts` makes them again."""
    rest = leaves[0].shape[1:]
    heads = [leaf.reshape(-1, self.head or len(leaf), *rest) for leaf in leaves]
    return np.concatenate(heads, 1).reshape(-1, *rest)

  def _parts(self, tensor: Any, number: int) -> list[Any]:
    rest = tensor.shape[1:]
    heads = tensor.reshape(-1, number * self.head or len(tensor), *rest)
    return [part.reshape(-1, *rest) for part in np.split(heads, number, 1)]

  def inward(
    self, key: str, paths: list[str], tensor: Any, shapes: list[tuple]
  ) -> list[Any]:
    """Returns the leaves that a foreign tensor holds.

    Args:
      key: the foreign name.
      paths: the leaves' paths, as `keys` returns them.
      tensor: the foreign tensor.
      shapes: the leaves' shapes.
    """
    if self.flax or key in self.plain:
      return [tensor.reshape(shapes[0])]
    if paths[0].endswith("/kernel") and re.search(self.convolved, paths[0]):
      tensor = tensor[..., 0, 0]
    parts = self._parts(tensor, len(paths)) if len(paths) > 1 else [tensor]
    if paths[0].endswith("/kernel"):
      return [part.transpose(_FROM_TORCH[part.ndim]) for part in parts]
    return parts


def _by_head(path: str, leaf: Any) -> Any:
  """Returns an array of attention with an axis of heads, of 64 channels each.

  So many they have in all of Google's ViTs but the huge one, which is not ours.
  """
  if leaf.shape[-1] % 64:
    return leaf
  if re.search("/attn/[qkv]/", path):
    return leaf.reshape(*leaf.shape[:-1], -1, 64)
  if path.endswith("/attn/out/kernel"):
    return leaf.reshape(-1, 64, leaf.shape[-1])
  return leaf


# A kernel's axes as PyTorch has them, outputs, inputs, rows, columns, and back.
_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}
_FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}

_TIMM_CONVNEXT = stage_names.convnext("", ("head", "head.fc"))

# Of two that a format has for a family the first is the one it writes.
LAYOUTS = (
  Layout(
    "vit", ("timm", "ares"), models.Vit,
    r"blocks\.\d+\.attn\.qkv\.weight", vit_names.TIMM,
    pools=True,
  ),
  Layout(
    "vit_stem", ("timm",), models.Vit,
    r"patch_embed\.proj\.stem\.0\.weight",
    (*variant_names.STEM_VIT, *vit_names.TIMM),
    kind="stem",
    pools=True,
  ),
  # Their blocks have a ViT's names.
  Layout(
    "xcit", ("timm",), models.Xcit,
    r"cls_attn_blocks\.\d+\.attn\.q\.weight", variant_names.xcit("pos_embed"),
  ),
  Layout(
    "xcit_meta", ("meta",), models.Xcit,
    r"cls_attn_blocks\.\d+\.attn\.qkv\.weight",
    variant_names.xcit("pos_embeder", ("attn/[qkv]", "attn.qkv")),
  ),
  Layout(
    "torchvision_vit", ("torchvision",), models.Vit,
    r"encoder\.layers\.encoder_layer_\d+\.mlp\.0\.weight",
    vit_names.torchvision("0", "3"),
  ),
  Layout(
    "torchvision_vit_old", ("torchvision",), models.Vit,
    r"encoder\.layers\.encoder_layer_\d+\.mlp\.linear_1\.weight",
    vit_names.torchvision("linear_1", "linear_2"),
  ),
  Layout(
    "roli_vit", ("roli",), models.Vit, r"enc\.transformer\..*", vit_names.ROLI
  ),
  # Those of Steiner et al. 2022, and of Dosovitskiy et al. 2021.
  Layout(
    "google_vit", ("google",), models.Vit,
    r"Transformer/encoderblock_\d+/LayerNorm_0/scale", vit_names.GOOGLE,
    flax=True,
  ),
  Layout(
    "open_clip", ("open_clip",), models.Vit,
    r"visual\.transformer\.resblocks\..*", vit_names.open_clip("visual."),
    dropped=vit_names.TEXTS,
    plain=tuple(f"visual.{key}" for key in vit_names.CLIP_PLAIN),
    kind="clip",
  ),
  # The visual tower alone, as robust ones are trained.
  Layout(
    "open_clip_visual", ("open_clip",), models.Vit,
    "class_embedding", vit_names.open_clip(),
    plain=vit_names.CLIP_PLAIN,
    kind="clip",
  ),
  # Has the mark of other ViTs as well.
  Layout(
    "clip_vit", ("timm",), models.Vit,
    r"norm_pre\.weight",
    (("backbone/pre_norm", "norm_pre"), *vit_names.TIMM),
    kind="clip",
    pools=True,
  ),
  # So have these.
  Layout(
    "eva02", ("timm",), models.Vit,
    r"blocks\.\d+\.attn\.q_proj\.weight", (*vit_names.EVA02, *vit_names.TIMM),
    kind="gate_norm",
    pools=True,
  ),
  Layout(
    "eva02_fused", ("timm",), models.Vit,
    r"blocks\.\d+\.attn\.q_bias", (*vit_names.EVA02_FUSED, *vit_names.TIMM),
    kind="eva",
    pools=True,
  ),
  Layout(
    "swin", ("timm", "ares"), models.Swin,
    r"layers\.\d+\.blocks\.\d+\.attn\.qkv\.weight",
    stage_names.swin("head.fc"), stage_names.SWIN_BUFFERS,
  ),
  Layout(
    "swin_sparse", ("timm",), models.Swin,
    r"layers\.\d+\.blocks\.\d+\.mlp\.meansparse1\.threshold",
    (*variant_names.SPARSE_SWIN, *stage_names.swin("head.fc")),
    (*stage_names.SWIN_BUFFERS, *variant_names.SPARSE_COUNTERS),
    kind="sparse",
  ),
  Layout(
    "swin_old", ("microsoft", "timm", "ares"), models.Swin,
    r"layers\.0\.downsample\..*", stage_names.swin("head", late=True),
    stage_names.SWIN_BUFFERS,
  ),
  Layout(
    "roli_swin", ("roli",), models.Swin, r"enc\.layers\..*",
    stage_names.swin("head.last_layer", "enc.", late=True),
    stage_names.SWIN_BUFFERS,
  ),
  Layout(
    "convnext", ("timm", "ares"), models.ConvNext,
    r"stages\.\d+\.blocks\.\d+\.conv_dw\.weight",
    _TIMM_CONVNEXT,
  ),
  Layout(
    "open_clip_convnext", ("open_clip",), models.ConvNext,
    r"visual\.trunk\.stages\.\d+\.blocks\.\d+\.conv_dw\.weight",
    stage_names.convnext(
      "visual.trunk.", ("head/kernel", "visual.head.proj.weight")
    ),
    dropped=vit_names.TEXTS,
  ),
  Layout(
    "convnext_sparse", ("timm",), models.ConvNext,
    r"stages\.\d+\.blocks\.\d+\.drop_path\.1\.threshold",
    (*variant_names.SPARSE_CONVNEXT, *_TIMM_CONVNEXT),
    variant_names.SPARSE_COUNTERS,
    kind="sparse",
  ),
  Layout(
    "convnext_stem", ("timm",), models.ConvNext,
    r"stem\.stem\.0\.weight", (*variant_names.STEM_CONVNEXT, *_TIMM_CONVNEXT),
    kind="stem",
  ),
  Layout(
    "convnext_meta", ("meta",), models.ConvNext,
    r"stages\.\d+\.\d+\.dwconv\.weight", stage_names.CONVNEXT_META,
  ),
  Layout(
    "resnet", ("timm", "torchvision", "ares"), models.ResNet,
    r"layer1\.0\.conv1\.weight", residual_names.RESNET,
  ),
  Layout(
    "regnet", ("timm",), models.ResNet,
    r"s1\.b1\.conv1\.conv\.weight", residual_names.REGNET,
    kind="group",
  ),
  Layout(
    "mobilenetv3", ("timm",), models.MobileNet,
    r"blocks\.0\.0\.conv_dw\.weight", mobile_names.MOBILENETV3,
  ),
  *(
    Layout(
      name, ("timm",), models.Coatnet,
      rf"stages\.\d+\.blocks\.\d+\.{gates}\.fc1\.weight",
      mobile_names.coatnet(gates),
      kind=kind,
      convolved="/(attn|mlp)/",
      head=32,
    )
    for name, gates, kind in (
      ("coatnet", "se", ""), ("coatnet_first", "se_early", "squeeze_first"),
    )
  ),
  Layout(
    "efficientnet", ("efficientnet_pytorch",), models.MobileNet,
    r"_conv_stem\.weight", mobile_names.EFFICIENTNET,
    kind="same",
  ),
  Layout(
    "transformers_efficientnet", ("transformers",), models.MobileNet,
    r"efficientnet\.encoder\.top_conv\.weight",
    mobile_names.TRANSFORMERS_EFFICIENTNET,
    kind="same",
  ),
  Layout(
    "dm_wide_resnet", ("robustbench",), models.PreactResNet,
    r"init_conv\.weight", residual_names.DM_WIDE_RESNET,
    dropped=variant_names.SPARSE_COUNTERS,
    kind="same",
    stages=3,
  ),
  Layout(
    "wide_resnet", ("robustbench",), models.PreactResNet,
    r"block1\.layer\.0\.conv1\.weight", residual_names.WIDE_RESNET,
    # Some files hold a second first block that no pass goes through.
    dropped=(r"sub_block1\..*",),
    stages=3,
  ),
  Layout(
    "robust_wrn", ("robustbench",), models.PreactResNet,
    r"blocks\.0\.layer\.0\.convShortcut\.weight",
    residual_names.robust_wrn("convShortcut", "bn1"),
    stages=3,
  ),
  Layout(
    "robust_wrn_norm1", ("robustbench",), models.PreactResNet,
    r"blocks\.0\.layer\.0\.shortcut\.0\.weight",
    residual_names.robust_wrn("shortcut.0", "norm1"),
    stages=3,
  ),
  Layout(
    "preact_resnet", ("robustbench",), models.PreactResNet,
    r"layer2\.0\.shortcut\.0\.weight", residual_names.PREACT_RESNET,
    stages=4,
  ),
  Layout(
    "dm_preact_resnet", ("robustbench",), models.PreactResNet,
    r"conv_2d\.weight", residual_names.DM_PREACT_RESNET,
    kind="same",
    stages=4,
  ),
  # Has the marks of the two before as well, as their shortcuts lack a norm.
  Layout(
    "cifar_resnet", ("robustbench",), models.ResNet,
    r"layer2\.0\.shortcut\.1\.weight", residual_names.CIFAR_RESNET,
  ),
)  # fmt: skip

# The half of open_clip's files beside the visual one; its paths are those of a
# text tower alone.
TEXT = Layout(
  "open_clip_text", ("open_clip",), models.Text,
  r"token_embedding\.weight",
  vit_names.CLIP_TEXT,
  dropped=(
    r"visual\..*", "attn_mask", "input_resolution", "context_length",
    "vocab_size",
  ),
  plain=("positional_embedding", "text_projection"),
)  # fmt: skip

# Mean and standard deviation of a format's images; None: the model's own.
FORMATS = {
  "timm": None,
  "torchvision": zoo.IMAGENET,
  "ares": zoo.IMAGENET,
  "google": zoo.HALF,
  "microsoft": zoo.IMAGENET,
  "meta": zoo.IMAGENET,  # ConvNeXt's own
  "open_clip": zoo.CLIP,
  "efficientnet_pytorch": zoo.IMAGENET,
  "transformers": zoo.IMAGENET,
  "robustbench": zoo.CIFAR,
  "roli": zoo.IMAGENET,
}
