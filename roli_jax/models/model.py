"""A model: resize, normalise, backbone, head; pure functions of its trees."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from roli_jax import keys, trees
from roli_jax.types import Array, Float, Images, Key, Logits, Params, PyTree

# By the names of jax.image. Without antialiasing, and by half-pixel centres, as
# in torch.nn.functional.interpolate and RoLI's reference.
INTERPOLATIONS = {"bilinear": "linear", "bicubic": "cubic"}


@dataclasses.dataclass(frozen=True)
class Model:
  """The static half of a classifier; closed over by the step.

  Attributes:
    name: as in `models.MODELS`.
    backbone: images [b, h, w, c] to pooled features [b, d].
    head: features [b, d] to logits [b, k].
    num_classes: the head's width k.
    image_size: the side in pixels that images are resized to inside the model.
    mean: per channel, subtracted from images in [0, 1].
    std: per channel, by which the difference is divided, > 0.
    interpolation: how images are resized, a name in `INTERPOLATIONS`.
    dtype: the precision of the backbone's computation, as `bfloat16`; None:
      that of its arrays. Parameters, running statistics, the head and the
      pixels keep their own.
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

  def shapes(self) -> tuple[Params, PyTree]:
    """The shapes of what `init` returns; traced once for equal models."""
    return _init.eval_shape(self, keys.root(0))

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
      stats: running statistics of the backbone's normalisations.
      images: [b, h, w, c] of any size, in [0, 1].
      train: whether, with `updates_stats`, running statistics move.
      key: dropout and dropped paths draw from it; None: there are none.
    """
    moves = train and self.updates_stats
    features, moved = self._apply(params, stats, images, moves, key)
    logits: Any = self.head.apply({"params": params.head}, features)
    return logits, moved.get("batch_stats", stats)

  def features(
    self, params: Params, stats: PyTree, images: Images
  ) -> Float[Array, "b d"]:
    """The pooled features before the head, in evaluation mode."""
    return self._apply(params, stats, images)[0]

  def logits(self, params: Params, stats: PyTree, images: Images) -> Logits:
    """The logits in evaluation mode."""
    return self(params, stats, images)[0]

  def outputs(
    self, params: Params, stats: PyTree, images: Images
  ) -> dict[str, Array]:
    """The output of each module of the backbone by its path, as `block3/attn`.

    The backbone's own output, the features, stands under "". Where a ViT's is
    the class token, its last block returns no other.
    """
    plain = dataclasses.replace(self, backbone=self.backbone.clone(scan=False))
    _, seen = plain._apply(params, stats, images, captures=True)
    return {
      path.removesuffix("__call__/0").rstrip("/"): leaf
      for path, leaf in trees.paths(seen["intermediates"]).items()
    }

  # Traced once for images of a shape, whatever programs it becomes part of.
  @functools.partial(jax.jit, static_argnums=(0, 4, 6), inline=True)
  def _apply(
    self,
    params: Params,
    stats: PyTree,
    images: Images,
    moves: bool = False,
    key: Key[Array, ""] | None = None,
    captures: bool = False,
  ) -> tuple[Float[Array, "b d"], PyTree]:
    """The features, and the collections that the pass has changed.

    Those are `batch_stats` if `moves`, and, if `captures`, `intermediates`: the
    output of each module.
    """
    size = (self.image_size, self.image_size)
    if images.shape[1:3] != size:
      shape = (images.shape[0], *size, images.shape[3])
      method = INTERPOLATIONS[self.interpolation]
      images = jax.image.resize(images, shape, method, antialias=False)
    mean, std = (
      jnp.array(values).reshape(1, 1, 1, -1) for values in (self.mean, self.std)
    )
    inputs = (params.backbone, params.peft, (images - mean) / std)
    if self.dtype is not None:
      inputs = jax.tree.map(lambda x: x.astype(self.dtype), inputs)
    backbone, peft, x = inputs
    features, changed = self.backbone.apply(
      {"params": backbone, "peft": peft, "batch_stats": stats},
      x,
      train=moves,
      rngs={"dropout": key} if key is not None else None,
      mutable=["batch_stats"] * moves + ["intermediates"] * captures,
      capture_intermediates=captures,
    )
    if self.dtype is not None:  # the head computes in full precision
      wider = jnp.promote_types(features.dtype, jnp.float32)
      features = features.astype(wider)
    return features, changed


_init = jax.jit(Model.init, static_argnums=0)
