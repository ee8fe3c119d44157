"""A model: resize, normalise, backbone, head; pure functions of its trees."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from roli_jax import keys
from roli_jax.types import Array, Float, Images, Key, Logits, Params, PyTree


@dataclasses.dataclass(frozen=True)
class Model:
  """The static half of a classifier; closed over by the step.

  Attributes:
    name: as in `models.MODELS`.
    backbone: images to pooled features.
    head: features to logits.
    num_classes: the head's width.
    image_size: the side that images are resized to inside the model.
    channels: of an image.
    mean: per channel, subtracted from images in [0, 1].
    std: per channel, divided by.
  """

  name: str
  backbone: nn.Module
  head: nn.Module
  num_classes: int
  image_size: int
  channels: int
  mean: tuple[float, ...]
  std: tuple[float, ...]

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
      images: of any size, in [0, 1].
      train: whether dropout acts and statistics move.
      key: what dropout draws from.
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

  def _features(self, params, stats, images, train, key):
    size = (self.image_size, self.image_size)
    if images.shape[1:3] != size:
      shape = (images.shape[0], *size, images.shape[3])
      images = jax.image.resize(images, shape, "linear", antialias=False)
    mean, std = (
      jnp.array(values).reshape(1, 1, 1, -1) for values in (self.mean, self.std)
    )
    variables = {
      "params": params.backbone,
      "peft": params.peft,
      "batch_stats": stats,
    }
    features, moved = self.backbone.apply(
      variables,
      (images - mean) / std,
      train=train,
      rngs={"dropout": key} if key is not None else None,
      mutable=["batch_stats"] if train else [],
    )
    return features, moved.get("batch_stats", stats)
