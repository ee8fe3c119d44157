"""FGSM and PGD: one loop of projected steepest ascent in the pixels."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import losses, specs, threat
from roli_jax.attacks import base
from roli_jax.keys import fold
from roli_jax.threat import ThreatModel
from roli_jax.types import (
  Array,
  Float,
  Images,
  Int,
  Keys,
  Labels,
  Logits,
  LogitsFn,
  PerImage,
)

KEEP = ("sample", "batch", "last")
TRADES_START = 1e-3  # standard deviation of TRADES' start, in pixel values

# Images and the value of what each of them climbs.
Candidates = tuple[Images, Float[Array, " b"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pgd(base.Attack):
  """Projected gradient ascent (Madry et al. 2018, section 2.1).

  The gradient is taken with respect to the pixels only, in one loop whose
  memory does not grow with the number of steps. With K steps there are K + 1
  candidates, the start among them, and K + 1 forward passes.

  Attributes:
    threat: the ball and the box.
    num_steps: K; 0 returns the start. Data, like eps and the step size: other
      values compile nothing.
    step_size: in the norm of the threat model; None stands for eps / 4, as in
      RoLI (2/255 at 8/255).
    num_restarts: independent starts, >= 1, of which each image keeps the one
      of the highest loss.
    random_start: start at a uniform draw from the ball; with the loss `kl`,
      which has no gradient at the clean image, at a Gaussian draw of 0.001
      around it (Zhang et al. 2019, algorithm 1). False starts at the image.
    keep: which iterate is returned. `sample`: for each image the one of its
      highest loss. `batch`: the one of the highest mean loss over the batch, as
      in the RoLI reference; an image's result then depends on its batch.
      `last`: the last one.
    loss: the surrogate that is raised, a name in `losses.SURROGATES`. `kl`
      takes the clean logits in place of labels.
    targeted: whether labels are targets, whose loss is lowered.
  """

  threat: ThreatModel
  num_steps: int | Int[Array, ""] = 10
  step_size: PerImage | None = None
  num_restarts: int = base.static(1)
  random_start: bool = base.static(True)
  keep: str = base.static("sample")
  loss: str = base.static("ce")
  targeted: bool = base.target_field()
  is_long: ClassVar[bool] = False

  def __post_init__(self):
    specs.lookup(dict.fromkeys(KEEP), self.keep, "keep")
    specs.lookup(losses.SURROGATES, self.loss, "loss")
    if self.targeted and self.loss == "kl":
      raise ValueError("the loss kl aims at no class: take ce, margin or dlr")
    if isinstance(self.num_steps, int) and self.num_steps < 0:
      raise ValueError(f"num_steps must be >= 0, got {self.num_steps}")
    if self.num_restarts < 1:
      raise ValueError(f"num_restarts must be >= 1, got {self.num_restarts}")
    if isinstance(self.step_size, (int, float, np.generic)):
      most = 1.0 if self.threat.norm == "linf" else np.inf
      if not 0 <= self.step_size <= most or not np.isfinite(self.step_size):
        raise ValueError(
          "step_size is in units of an image in [0, 1] and must be within"
          f" [0, {most}], got {self.step_size}"
        )

  @property
  def name(self) -> str:
    """The name in result rows: `pgd`, or `pgd_<loss>` for a loss but `ce`."""
    return "pgd" if self.loss == "ce" else f"pgd_{self.loss}"

  @property
  def passes(self) -> tuple[int, int]:
    forward = int(self.num_steps) + self._compares
    return self.num_restarts * forward, self.num_restarts * int(self.num_steps)

  @property
  def _compares(self) -> bool:
    """Whether the last iterate's loss is needed, which costs one pass."""
    return self.keep != "last" or self.num_restarts > 1

  def scaled(self, ratio: float | Float[Array, ""]) -> "Pgd":
    """Returns the attack at `ratio` times the radius and the step size."""
    threat = dataclasses.replace(self.threat, eps=self.threat.eps * ratio)
    step_size = None if self.step_size is None else self.step_size * ratio
    return dataclasses.replace(self, threat=threat, step_size=step_size)

  def for_training(self, surrogate: str) -> "Pgd":
    """Returns this attack, raising KL if the objective asks for that."""
    return dataclasses.replace(self, loss="kl") if surrogate == "kl" else self

  def __call__(
    self,
    logits_fn: LogitsFn,
    images: Images,
    labels: Labels | Logits,
    keys: Keys,
  ) -> Images:
    surrogate = self._surrogate
    eps = self.threat.eps
    step_size = eps / 4 if self.step_size is None else self.step_size
    step_size = threat.per_image(step_size, images)

    def climb(x: Images) -> tuple[jax.Array, jax.Array]:
      logits = logits_fn(x)
      values = surrogate.climb(logits, labels)
      # Logits that rank nothing are a break: nothing is higher. They reach no
      # target.
      most = -jnp.inf if self.targeted else jnp.inf
      kept = jnp.where(losses.is_ranking(logits), values, most)
      return values.sum(), kept  # each image's gradient is its own

    def step(
      _: jax.Array, carry: tuple[Images, Candidates]
    ) -> tuple[Images, Candidates]:
      x, best = carry
      grads, values = jax.grad(climb, has_aux=True)(x)
      best = self._better(best, x, values)
      x = x + step_size * self.threat.steepest(base.finite(grads), x)
      return self.threat.project(x, images), best

    def restart(i: int | jax.Array, best: Candidates | None) -> Candidates:
      own_keys = fold(keys, i)
      start = self._start(images, own_keys)
      none = (start, jnp.full(len(images), -jnp.inf))
      x, kept = jax.lax.fori_loop(0, self.num_steps, step, (start, none))
      if self.keep == "last":
        kept = none
      if self._compares:
        kept = self._better(kept, x, climb(x)[1])
      else:
        kept = (x, none[1])
      return kept if best is None else self._better(best, *kept)

    best = restart(0, None)
    if self.num_restarts > 1:
      best = jax.lax.fori_loop(1, self.num_restarts, restart, best)
    return best[0]

  @property
  def _surrogate(self) -> losses.Surrogate:
    raised = losses.SURROGATES[self.loss]
    return raised.lowered if self.targeted else raised

  def _start(self, images: Images, keys: Keys) -> Images:
    if not self.random_start:
      return images
    if self.loss == "kl":
      noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))
      return self.threat.project(images + TRADES_START * noise(keys), images)
    return self.threat.sample(keys, images)

  def _better(
    self, best: Candidates, x: Images, values: Float[Array, " b"]
  ) -> Candidates:
    """The better of two candidates of each image; a tie keeps the first."""
    best_x, best_values = best
    wins = values > best_values
    if self.keep == "batch":
      loss = self._surrogate.loss
      higher = loss(values).mean() > loss(best_values).mean()
      wins = jnp.broadcast_to(higher, values.shape)
    return base.where(wins, (x, values), (best_x, best_values))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fgsm(base.Attack):
  """One step to the edge of the ball (Goodfellow et al. 2015).

  Attributes:
    threat: the ball and the box.
    loss: the surrogate that is raised, a name in `losses.SURROGATES`.
    random_start: whether the step starts at a uniform draw from the ball, and
      is 1.25 times as long (Wong et al. 2020, FGSM-RS): for training.
    targeted: whether labels are targets, whose loss is lowered.
  """

  threat: ThreatModel
  loss: str = base.static("ce")
  random_start: bool = base.static(False)
  targeted: bool = base.target_field()
  passes: ClassVar[tuple[int, int]] = (1, 1)
  is_long: ClassVar[bool] = False

  @property
  def name(self) -> str:
    """The name in result rows."""
    return "fgsm_rs" if self.random_start else "fgsm"

  def for_training(self, surrogate: str) -> "Fgsm":
    """Returns this attack, raising KL if the objective asks for that."""
    return dataclasses.replace(self, loss="kl") if surrogate == "kl" else self

  def __call__(
    self,
    logits_fn: LogitsFn,
    images: Images,
    labels: Labels | Logits,
    keys: Keys,
  ) -> Images:
    step = Pgd(
      self.threat,
      num_steps=1,
      step_size=self.threat.eps * (1.25 if self.random_start else 1.0),
      random_start=self.random_start,
      keep="last",
      loss=self.loss,
      targeted=self.targeted,
    )
    return step(logits_fn, images, labels, keys)
