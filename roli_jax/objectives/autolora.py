"""AutoLoRa (Xu et al. 2024): clean images teach a branch, attacked ones do not.

The authors' code is Finetuning_Methods/AutoLoRa in
GodXuxilie/RobustSSL_Benchmark.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from roli_jax import losses
from roli_jax.objectives.base import Batch, Forward, LossOutput
from roli_jax.types import Labels, Logits, Params, PyTree


@dataclasses.dataclass(frozen=True)
class AutoLora:
  """(1 - A) CE(clean) + A CE(adv) + beta A KL(clean || adv).

  Clean images see the backbone with its branch of LoRA, adversarial ones the
  backbone alone, which is also what attacks and tests see. The clean logits'
  gradient reaches the branch and the head, the adversarial ones' the backbone
  and the head; that of KL goes both ways, as in the authors' code.

  A is the accuracy on clean training images, with the branch, in the epoch
  before. The authors measure it at each epoch's start in a separate pass and in
  evaluation mode. Ours counts during training; in the first epoch it is the
  accuracy on the images so far.

  The authors' rule for the learning rate is left out: at fixed epochs they
  halve it and return to the best checkpoint, if robust accuracy in validation
  has rarely risen since the last of these epochs.

  Attributes:
    beta: the weight of the last term at A = 1, >= 0; the authors use 6.
    epoch_steps: the number of steps of an epoch, >= 1.
  """

  beta: float | int = 6.0
  epoch_steps: int = 1
  surrogate: ClassVar[str] = "ce"
  adversarial: ClassVar[float] = 1.0
  needs_clean: ClassVar[bool] = True

  def __post_init__(self):
    if not self.beta >= 0:
      raise ValueError(f"beta must be >= 0, got {self.beta}")
    if self.epoch_steps < 1:
      raise ValueError(f"an epoch has at least 1 step, got {self.epoch_steps}")

  def init_memory(self, params: Params, stats: PyTree) -> PyTree:
    del stats
    if not params.peft:
      raise ValueError(
        "autolora trains a branch beside the backbone, and there is none; take"
        " method=autolora"
      )
    counts = {k: jnp.zeros((), jnp.int32) for k in ("correct", "seen", "steps")}
    return {**counts, "accuracy": jnp.zeros(())}

  def __call__(
    self,
    forward: Forward,
    params: Params,
    stats: PyTree,
    memory: PyTree,
    batch: Batch,
  ) -> LossOutput:
    held = jax.lax.stop_gradient(params.backbone)
    absent = jax.tree.map(jnp.zeros_like, params.peft)
    with_branch = dataclasses.replace(params, backbone=held)
    without = dataclasses.replace(params, peft=absent)
    clean, moved = forward(with_branch, stats, batch.clean)
    adv, moved = forward(without, moved, batch.adv)
    memory = self.counted(memory, clean, batch.labels)
    a = memory["accuracy"]
    values = (
      (1 - a) * losses.cross_entropy(clean, batch.labels)
      + a * losses.cross_entropy(adv, batch.labels)
      + self.beta * a * losses.kl(adv, clean)
    )
    return LossOutput(values=values, logits=adv, stats=moved, memory=memory)

  def counted(self, memory: PyTree, clean: Logits, labels: Labels) -> PyTree:
    """Returns the memory after a step, with the accuracy A for its weights.

    An epoch's accuracy holds from its last step on.

    Args:
      memory: the counts `correct`, `seen` and `steps`, int32 [], and
        `accuracy`, float [], before the step.
      clean: the clean logits, [b, k].
      labels: the classes, [b].
    """
    steps = memory["steps"] + 1
    correct = memory["correct"] + losses.correct(clean, labels).sum()
    seen = memory["seen"] + len(labels)
    ends = steps % self.epoch_steps == 0
    renewed = ends | (steps <= self.epoch_steps)
    return {
      "correct": jnp.where(ends, 0, correct),
      "seen": jnp.where(ends, 0, seen),
      "steps": steps,
      "accuracy": jnp.where(renewed, correct / seen, memory["accuracy"]),
    }
