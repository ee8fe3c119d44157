"""What an attack raises, and what training lowers.

A *surrogate* gives each image's loss, which an attack raises in the pixels. An
*objective* gives each image's loss from clean and adversarial logits, which
training lowers in the weights; it names the surrogate that its inner attack
raises.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax.types import Array, Bool, Float, Integer, Labels, Logits


def correct(logits: Logits, labels: Labels) -> Bool[Array, " b"]:
  """Whether each image's largest logit is its label's.

  A tie goes to the lower class. Logits that rank nothing are not correct.
  """
  return (jnp.argmax(logits, -1) == labels) & is_ranking(logits)


def is_ranking(
  logits: Float[Array | np.ndarray, "*b k"],
) -> Bool[Array | np.ndarray, "*b"]:
  """Whether logits say which class is first: no NaN, no +inf, not all -inf.

  -inf is the lowest logit there is: of a class that is masked. NumPy in, NumPy
  out.
  """
  xp = np if isinstance(logits, np.ndarray) else jnp
  strange = xp.isnan(logits) | (logits == xp.inf)
  return ~strange.any(-1) & (logits > -xp.inf).any(-1)


def cross_entropy(
  logits: Logits, labels: Labels, smoothing: float | int = 0.0
) -> Float[Array, " b"]:
  """-log softmax of the label's logit.

  With `smoothing` s in [0, 1) of smoothed labels, which give s / k to each of k
  classes and 1 - s more to their own (Szegedy et al. 2016, section 7).
  """
  total, target = jax.nn.logsumexp(logits, axis=-1), own(logits, labels)
  if smoothing:
    target = (1 - smoothing) * target + smoothing * logits.mean(-1)
  return total - target


def margin(logits: Logits, labels: Labels) -> Float[Array, " b"]:
  """The best other logit minus the label's: positive where misclassified."""
  return _others(logits, labels).max(-1) - own(logits, labels)


def kl(logits: Logits, target: Logits) -> Float[Array, " b"]:
  """KL(softmax(target) || softmax(logits)), TRADES' inner loss."""
  log_p = jax.nn.log_softmax(target)
  apart = log_p - jax.nn.log_softmax(logits)
  # A class that the target masks with -inf has no share, and -inf - -inf none.
  masked = jnp.isneginf(log_p)
  return (jnp.exp(log_p) * jnp.where(masked, 0, apart)).sum(-1)


def log_odds(logits: Logits, labels: Labels) -> Float[Array, " b"]:
  """log((1 - p) / p) for the label's probability p; CE is its softplus.

  Raising it raises cross-entropy: the gradients of an image point the same
  way. But where p rounds to 1, as under large logits, cross-entropy is 0 with
  all of its gradient, and an attack that climbs it stands still and flatters
  the model. The log odds go on.
  """
  others = jax.nn.logsumexp(_others(logits, labels), axis=-1)
  return others - own(logits, labels)


def dlr(logits: Logits, labels: Labels) -> Float[Array, " b"]:
  """The difference of logits ratio (Croce and Hein 2020a, eq. 6).

  The margin over the distance from the largest logit to the third: the same
  for all scales and shifts of the logits. With two classes there is no third,
  and it is the margin.
  """
  if logits.shape[-1] < 3:
    return margin(logits, labels)
  top, _ = jax.lax.top_k(logits, 3)
  return _ratio(margin(logits, labels), top[:, 0] - top[:, 2])


def margin_towards(
  logits: Logits, labels: Labels, targets: Labels
) -> Float[Array, " b"]:
  """The target's logit minus the label's."""
  return own(logits, targets) - own(logits, labels)


def cross_entropy_towards(
  logits: Logits, labels: Labels, targets: Labels
) -> Float[Array, " b"]:
  """log softmax of the target's logit."""
  del labels
  return -cross_entropy(logits, targets)


def dlr_towards(
  logits: Logits, labels: Labels, targets: Labels
) -> Float[Array, " b"]:
  """The targeted difference of logits ratio (Croce and Hein 2020a, eq. 7).

  The margin to the target over the distance from the largest logit to the
  middle between third and fourth. With fewer than four classes it is the
  margin to the target.
  """
  towards = margin_towards(logits, labels, targets)
  if logits.shape[-1] < 4:
    return towards
  top, _ = jax.lax.top_k(logits, 4)
  return _ratio(towards, top[:, 0] - (top[:, 2] + top[:, 3]) / 2)


def _ratio(
  gap: Float[Array, " b"], width: Float[Array, " b"]
) -> Float[Array, " b"]:
  """Returns gap / width; the gap alone where too many classes are masked."""
  # Chosen before dividing: gradients of gap / inf are 0 / inf and inf / inf.
  few = jnp.isinf(width)
  return gap / (jnp.where(few, 1.0, width) + jnp.where(few, 0.0, TINY))


def rivals(
  logits: Logits, labels: Labels, count: int
) -> Integer[Array, "b count"]:
  """The `count` classes of largest logit beside the label, largest first."""
  return jax.lax.top_k(_others(logits, labels), count)[1]


TINY = 1e-12  # guards divisions by a difference of logits


def _is_own(logits: Logits, labels: Labels) -> Bool[Array, "b k"]:
  return jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)


def own(logits: Logits, labels: Labels) -> Float[Array, " b"]:
  """Each image's logit of its label."""
  return jnp.where(_is_own(logits, labels), logits, 0).sum(-1)


def _others(logits: Logits, labels: Labels) -> Float[Array, "b k"]:
  """All logits but the label's, which is minus infinity."""
  return jnp.where(_is_own(logits, labels), -jnp.inf, logits)


def _same(values: Float[Array, " b"]) -> Float[Array, " b"]:
  return values


@dataclasses.dataclass(frozen=True)
class Surrogate:
  """A loss that attacks raise.

  Attributes:
    climb: `(logits, labels) -> [b]`, whose gradient the attack follows; grows
      with the loss.
    loss: `[b] -> [b]`, the loss from that, for means over images.
  """

  climb: Callable[..., Float[Array, " b"]]
  loss: Callable[[Float[Array, " b"]], Float[Array, " b"]] = _same

  @property
  def lowered(self) -> "Surrogate":
    """What a targeted attack raises: minus the loss of its targets."""
    return Surrogate(
      lambda logits, targets: -self.climb(logits, targets),
      lambda values: -self.loss(-values),
    )


SURROGATES = {
  "ce": Surrogate(log_odds, jax.nn.softplus),
  "margin": Surrogate(margin),
  "dlr": Surrogate(dlr),
  "kl": Surrogate(kl),
}


# Towards a class: `(logits, labels, targets) -> [b]`.
TOWARDS = {
  "ce": cross_entropy_towards,
  "margin": margin_towards,
  "dlr": dlr_towards,
}


@runtime_checkable
class Objective(Protocol):
  """What training lowers.

  Attributes:
    surrogate: the name of the loss that the inner attack raises by default.
    adversarial: the share of a batch that is attacked: 0, 0.5 or 1.
    needs_clean: whether it takes the clean logits of attacked images.
  """

  surrogate: ClassVar[str]
  adversarial: ClassVar[float]
  needs_clean: ClassVar[bool]

  def __call__(
    self, *, clean: Logits | None, adv: Logits, labels: Labels
  ) -> Float[Array, " b"]: ...


@dataclasses.dataclass(frozen=True)
class Clean:
  """Cross-entropy on clean images: ordinary training.

  Attributes:
    smoothing: of labels, in [0, 1), see `cross_entropy`; 0: none. Attacks see
      the labels as they are.
  """

  smoothing: float | int = 0.0
  surrogate: ClassVar[str] = "ce"
  adversarial: ClassVar[float] = 0.0
  needs_clean: ClassVar[bool] = False

  def __post_init__(self) -> None:
    if not 0 <= self.smoothing < 1:
      raise ValueError(f"smoothing must be in [0, 1), got {self.smoothing}")

  def __call__(
    self, *, clean: Logits | None, adv: Logits, labels: Labels
  ) -> Float[Array, " b"]:
    del clean
    return cross_entropy(adv, labels, self.smoothing)


@dataclasses.dataclass(frozen=True)
class At(Clean):
  """Cross-entropy on adversarial images only (Madry et al. 2018, eq. 2.1)."""

  adversarial: ClassVar[float] = 1.0


@dataclasses.dataclass(frozen=True)
class HalfAt(Clean):
  """Cross-entropy on a batch of which every other image is attacked.

  Half clean, half adversarial, as in Goodfellow et al. 2015 and in the RoLI
  reference's HALF_ADV.
  """

  adversarial: ClassVar[float] = 0.5


@dataclasses.dataclass(frozen=True)
class _TwoTerms:
  """A loss of clean and adversarial logits.

  Attributes:
    beta: the weight of the second term, >= 0.
  """

  beta: float | int
  adversarial: ClassVar[float] = 1.0
  needs_clean: ClassVar[bool] = True

  def __post_init__(self) -> None:
    if not self.beta >= 0:
      raise ValueError(f"beta must be >= 0, got {self.beta}")


@dataclasses.dataclass(frozen=True)
class Trades(_TwoTerms):
  """CE(clean) + beta KL(clean || adv) (Zhang et al. 2019, eq. 5).

  Attributes:
    beta: the weight of the robust term, >= 0; 1/lambda in the paper, which
      uses 6 on CIFAR-10.
  """

  beta: float | int = 6.0
  surrogate: ClassVar[str] = "kl"

  def __call__(
    self, *, clean: Logits | None, adv: Logits, labels: Labels
  ) -> Float[Array, " b"]:
    assert clean is not None
    return cross_entropy(clean, labels) + self.beta * kl(adv, clean)


@dataclasses.dataclass(frozen=True)
class Mart(_TwoTerms):
  """MART (Wang et al. 2020, eq. 11): adversarial images, misclassified first.

  BCE(adv) + beta (1 - p_y(clean)) KL(clean || adv), where BCE is cross-entropy
  minus log(1.0001 - the largest probability of another class). The constant is
  the authors' code's. Not cross-entropy without an attack: BCE asks for a
  margin.

  Attributes:
    beta: the weight of the second term, >= 0; the authors use 5 and 6.
  """

  beta: float | int = 5.0
  surrogate: ClassVar[str] = "ce"

  def __call__(
    self, *, clean: Logits | None, adv: Logits, labels: Labels
  ) -> Float[Array, " b"]:
    assert clean is not None
    rival = jnp.exp(_others(jax.nn.log_softmax(adv), labels).max(-1))
    bce = cross_entropy(adv, labels) - jnp.log(1.0001 - rival)
    unsure = 1 - jnp.exp(-cross_entropy(clean, labels))
    return bce + self.beta * unsure * kl(adv, clean)


OBJECTIVES: dict[str, Any] = {
  "clean": Clean,
  "at": At,
  "half_at": HalfAt,
  "trades": Trades,
  "mart": Mart,
}
