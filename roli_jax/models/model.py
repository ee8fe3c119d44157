"""A model: resize, normalise, backbone, head; pure functions of its trees."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from roli_jax import keys, trees
from roli_jax.types import Array, Float, Images, Key, Logits, Params, PyTree

# What jax.image calls them. Without antialiasing, and by half-pixel centres, as
# torch.nn.functional.interpolate and RoLI's reference have it.
INTERPOLATIONS = {"bilinear": "linear", "bicubic": "cubic"}


@dataclasses.dataclass(frozen=True)
class Model:
  """The static half of a classifier; closed over by the step.

  Attributes:
    name: as in `models.MODELS`.
    backbone: images to pooled features.
    head: features to logits.
    num_classes: the head's width.
    image_size: the side that images are resized to inside the model.
    mean: per channel, subtracted from images in [0, 1].
    std: per channel, divided by.
    interpolation: how they are resized, a name in `INTERPOLATIONS`.
    dtype: the precision of the backbone's computation. Parameters, running
      statistics, the head and the pixels keep their own.
    updates_stats: whether training that reaches the whole backbone also moves
      its running statistics. Attacks and evaluation never do.
  """

  name: str
  backbone: nn.Module
  head: nn.Module
  num_classes: int
  image_size: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  interpolation: str = "bilinear"
  dtype: str | None = None
  updates_stats: bool = False

  @property
  def channels(self) -> int:
    """The number of an image's channels."""
    return len(self.mean)

  def init(self, key: Key[Array, ""]) -> tuple[Params, PyTree]:
    """Random parameters, and the running statistics (`{}` without any).

    The backbone and the head draw from streams of their own: a seed's head is
    the same whatever the backbone.
    """
    images = jnp.zeros((1, self.image_size, self.image_size, self.channels))
    features, variables = jax.jit(self.backbone.init_with_output)(
      keys.stream(key, "backbone"), images
    )
    head = jax.jit(self.head.init)(keys.stream(key, "head"), features)
    params = Params(
      backbone=variables["params"],
      peft=variables.get("peft", {}),
      head=head["params"],
    )
    return params, variables.get("batch_stats", {})

  def __call__(
    self,
    params: Params,
    stats: PyTree,
    images: Images,
    *,
    train: bool = False,
    key: Key[Array, ""] | None = None,
  ) -> tuple[Logits, PyTree]:
    """Logits, and the running statistics after this batch.

    Args:
      params: the three trees.
      stats: running statistics, used as they are unless `train`.
      images: [b, h, w, c] of any size, in [0, 1].
      train: whether, with `updates_stats`, running statistics move.
      key: what dropout draws from; None: there is none.
    """
    features, stats = self._features(params, stats, images, train, key)
    logits: Any = self.head.apply({"params": params.head}, features)
    return logits, stats

  def features(
    self, params: Params, stats: PyTree, images: Images
  ) -> Float[Array, "b d"]:
    """The pooled features before the head, in evaluation mode."""
    return self._features(params, stats, images, False, None)[0]

  def logits(self, params: Params, stats: PyTree, images: Images) -> Logits:
    """The logits in evaluation mode."""
    return self(params, stats, images)[0]

  def outputs(
    self, params: Params, stats: PyTree, images: Images
  ) -> dict[str, Any]:
    """What each module of the backbone returns, by its path: `block3/attn`.

    The backbone's own output, the features, stands under "". Where a ViT's is
    the class token, its last block returns no other.
    """
    plain = dataclasses.replace(self, backbone=self.backbone.clone(scan=False))
    _, seen = plain._apply(
      params, stats, images, False, None, capture_intermediates=True
    )
    tree = seen["intermediates"]
    return {
      path.removesuffix("__call__/0").rstrip("/"): leaf
      for path, leaf in trees.paths(tree).items()
    }

  def _features(self, params, stats, images, train, key):
    moves = train and self.updates_stats
    features, moved = self._apply(params, stats, images, moves, key)
    if self.dtype is not None:  # the head computes in full precision
      wider = jnp.promote_types(features.dtype, jnp.float32)
      features = features.astype(wider)
    return features, moved.get("batch_stats", stats)

  def _apply(self, params, stats, images, moves, key, **capture):
    size = (self.image_size, self.image_size)
    if images.shape[1:3] != size:
      shape = (images.shape[0], *size, images.shape[3])
      method = INTERPOLATIONS[self.interpolation]
      images = jax.image.resize(images, shape, method, antialias=False)
    mean, std = (
      jnp.array(values).reshape(1, 1, 1, -1) for values in (self.mean, self.std)
    )
    inputs = (params.backbone, params.peft, (images - mean) / std)
    backbone, peft, x = jax.tree.map(self._lowered, inputs)
    return self.backbone.apply(
      {"params": backbone, "peft": peft, "batch_stats": stats},
      x,
      train=moves,
      rngs={"dropout": key} if key is not None else None,
      mutable=[*["batch_stats"] * moves, *["intermediates"] * bool(capture)],
      **capture,
    )

  def _lowered(self, x):
    return x if self.dtype is None else x.astype(self.dtype)
