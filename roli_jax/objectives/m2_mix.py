"""m2-Mix (Oh et al. 2023) beside a classifier's loss; see `mixup`."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from roli_jax import keys, specs
from roli_jax.clip import mixup
from roli_jax.models import heads
from roli_jax.objectives.base import Batch, Forward
from roli_jax.types import Array, Float, Params, PyTree

IMAGES = {"clean": "clean", "adv": "adv"}


@dataclasses.dataclass(frozen=True)
class M2Mix:
  """weight / (epoch + 1) times `mixup.m2_mix_loss` of images and their classes.

  For a model with a head `heads.Cosine`. An image's embedding is its feature,
  projected and scaled to length 1, in evaluation mode as in the authors' code.
  The embedding of its text is our choice: the class's column in the head that
  the stage began with, scaled to length 1. Texts do not train. Pairs of one
  class in a batch are not negatives either. The loss is that of the batch, the
  same for each image.

  Attributes:
    weight: the weight in epoch 0, >= 0; the authors use 0.001 to 0.05.
    beta: the parameter of the Beta distribution of the ratio, > 0.
    tau: the temperature, > 0.
    reduction: see `mixup.m2_mix_loss`.
    images: `clean`, or `adv` for the images that are trained on.
    epoch_steps: the number of steps of an epoch, >= 1.
  """

  weight: float | int = 0.01
  beta: float | int = 0.5
  tau: float | int = 0.07
  reduction: str = "sum"
  images: str = "clean"
  epoch_steps: int = 1
  needs_start: ClassVar[bool] = False  # from a random head there is no Cosine

  def __post_init__(self):
    specs.lookup(IMAGES, self.images, "images")
    reductions = {name: name for name in mixup.REDUCTIONS}
    specs.lookup(reductions, self.reduction, "reduction")
    if not self.weight >= 0:
      raise ValueError(f"weight must be >= 0, got {self.weight}")
    for name in ("beta", "tau"):
      if not getattr(self, name) > 0:
        raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
    if self.epoch_steps < 1:
      raise ValueError(f"an epoch has at least 1 step, got {self.epoch_steps}")

  @property
  def needs_attack(self) -> bool:
    return self.images == "adv"

  @property
  def needs_clean(self) -> bool:
    return self.images == "clean"

  def init_memory(self, params: Params, stats: PyTree) -> PyTree:
    del stats
    if "projection" not in params.head:
      raise ValueError(
        "m2_mix pairs images with their classes' texts, and the model has a"
        " linear head; it wants a zero-shot one (zeroshot.classifier)"
      )
    texts = heads.unit(params.head["kernel"].T)
    return {"texts": texts, "steps": jnp.zeros((), jnp.int32)}

  def __call__(
    self,
    forward: Forward,
    params: Params,
    stats: PyTree,
    memory: PyTree,
    batch: Batch,
  ) -> tuple[Float[Array, " b"], PyTree]:
    images = batch.adv if self.images == "adv" else batch.clean
    features = forward.model.features(params, stats, images)
    loss = mixup.m2_mix_loss(
      heads.unit(features @ params.head["projection"]["kernel"]),
      memory["texts"][batch.labels],
      keys.stream(batch.key, "m2_mix"),
      beta=self.beta,
      tau=self.tau,
      reduction=self.reduction,
      same=batch.labels[:, None] == batch.labels[None],
    )
    epoch = jnp.floor(memory["steps"] / self.epoch_steps)
    value = self.weight * mixup.weight_schedule(epoch) * loss
    kept = {**memory, "steps": memory["steps"] + 1}
    return jnp.full(len(images), value), kept
