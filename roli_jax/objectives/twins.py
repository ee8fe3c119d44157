"""TWINS (Liu et al. 2023): batch normalisation as pretrained, and adapting.

The authors' code is ziquanliu/CVPR2023-TWINS.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from roli_jax import losses, models
from roli_jax.objectives.base import Batch, Forward, LossOutput
from roli_jax.types import Params, PyTree


@dataclasses.dataclass(frozen=True)
class Twins:
  """lam CE(frozen half) + CE(adaptive half), on adversarial images.

  Half of a batch is normalised by the running statistics that the stage began
  with, which stay fixed; the other half by its batch statistics, which move the
  running ones. Both halves share all parameters. (In the authors' code each
  half has scales and biases of normalisation of its own.)

  Attacks and tests see the model's running statistics, the moving ones, as in
  the authors' code. They move whatever the method and the model's options.

  The halves are every other image, the first one frozen; the authors' are the
  first and the last images.

  Attributes:
    lam: the weight of the frozen half, >= 0; the authors' default is 0.3, their
      scripts use 0.4 and 1.
  """

  lam: float | int = 0.3
  surrogate: ClassVar[str] = "ce"
  adversarial: ClassVar[float] = 1.0
  needs_clean: ClassVar[bool] = False

  def __post_init__(self):
    if not self.lam >= 0:
      raise ValueError(f"lam must be >= 0, got {self.lam}")

  def init_memory(self, params: Params, stats: PyTree) -> PyTree:
    del params
    if not stats:
      raise ValueError(
        "twins is about batch normalisation, and the model has no running"
        " statistics; take a ResNet"
      )
    return {"frozen": stats}

  def __call__(
    self,
    forward: Forward,
    params: Params,
    stats: PyTree,
    memory: PyTree,
    batch: Batch,
  ) -> LossOutput:
    b = len(batch.labels)
    if b % 2:
      raise ValueError(f"twins needs an even number of images, got {b}")
    # Every other image: no device's part has to move.
    pairs = batch.adv.reshape(-1, 2, *batch.adv.shape[1:])
    as_pretrained, adapting = (
      dataclasses.replace(
        forward,
        model=models.with_options(forward.model, updates_stats=moves),
        train=True,
      )
      for moves in (False, True)
    )
    frozen, _ = as_pretrained(params, memory["frozen"], pairs[:, 0])
    adaptive, stats = adapting(params, stats, pairs[:, 1])
    logits = jnp.stack([frozen, adaptive], 1).reshape(b, -1)
    # Twice, so that the mean over the batch adds the means over the halves.
    weights = jnp.tile(jnp.array([2 * self.lam, 2.0]), b // 2)
    values = weights * losses.cross_entropy(logits, batch.labels)
    return LossOutput(values=values, logits=logits, stats=stats, memory=memory)
