"""Two classifiers as one: mixed in their weights, or in their outputs.

The first is the zero-shot model, or the robust backbone with its linear probe;
the second was fine-tuned from it. The outputs are log probabilities, which
attacks and evaluation treat as logits.

An ensemble is attacked as a whole, through both models and the weight between
them: an image that fools one model may leave the other right, so that attacks
on one overstate the robustness of both. Yet gradients through VRF's weight can
mislead, and an attack on one model may break an image that the attack on the
whole misses. Evaluate the ensemble under both, and under a black-box attack.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import losses, trees
from roli_jax.types import Array, Float, Images, Integer, Labels, Logits, PyTree

Number = float | int | Float[Array | np.ndarray, ""]
Features = Float[Array | np.ndarray, "b d"]
Held = Float[Array | np.ndarray, "held k"]
HeldLabels = Integer[Array | np.ndarray, "held"]
Predict = Callable[[Any, Images], Logits]
Both = Callable[[Any, Images], tuple[Features, Logits]]

COLDEST, HOTTEST = 0.1, 10.0  # the range of temperatures, as in the code
RULES = ("code", "paper")

AnyArray = Array | np.ndarray
# One weight for all images, or one for each.
PerImageColumn = float | Float[Array, ""] | Float[Array, "b 1"]


def wse(first: PyTree, second: PyTree, alpha: Number) -> PyTree:
  """Returns (1 - alpha) first + alpha second, leaf by leaf (WiSE-FT).

  Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", section 3.
  Running statistics are mixed like weights where the trees hold them. That is
  our reading: the models of the paper have none.

  Args:
    first: a tree of floats, such as `(params, stats)`.
    second: one of the same names and shapes.
    alpha: in [0, 1]; 0 is the first, 1 the second, exactly.

  Raises:
    ValueError: trees that differ, or an alpha that is no share.
  """
  _check_share(alpha)
  trees.check_same(second, first, "the second model")

  def mix(x: jax.Array | np.ndarray, y: jax.Array | np.ndarray) -> jax.Array:
    share = jnp.asarray(alpha, x.dtype)
    return (1 - share) * x + share * y

  return jax.tree.map(mix, first, second)


def ose(
  first_logits: Logits,
  second_logits: Logits,
  alpha: Number,
  t_first: Number = 1,
  t_second: Number = 1,
) -> Logits:
  """Returns log((1 - alpha) softmax(first / t) + alpha softmax(second / t)).

  The output-space ensemble that VRF is compared with: one weight for all
  images.

  Args:
    first_logits: the zero-shot model's logits, [b, k].
    second_logits: the fine-tuned model's logits, [b, k].
    alpha: in [0, 1]; 0 is the first, 1 the second. Data, like temperatures.
    t_first: the first model's temperature, > 0.
    t_second: the second model's temperature, > 0.
  """
  _check_share(alpha)
  return _mixed(
    first_logits / t_first,
    second_logits / t_second,
    jnp.log1p(-alpha),
    jnp.log(alpha),
  )


def temperature(logits: Logits, labels: Labels) -> float:
  """Finds the T at which the mean of max softmax(logits / T) is the accuracy.

  Within [0.1, 10]; the nearer end where no T in between has that property, as
  for a model that is always right. The mean confidence falls with T, so
  bisection finds it. The authors' code (VRF, Zhu et al. 2024) takes steps of
  regula falsi to a gap of 0.001, and goes beyond the ends.

  Args:
    logits: [b, k], of images that the model was not trained on, and never of
      the test set.
    labels: their classes, [b].

  Raises:
    ValueError: no images, or logits that are +inf or NaN.
  """
  logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
  if not len(labels) or len(labels) != len(logits):
    raise ValueError(
      "a temperature needs labelled images, got"
      f" {len(logits)} rows of logits and {len(labels)} labels"
    )
  if not losses.is_ranking(logits).all():
    raise ValueError("a temperature needs finite logits, got +inf or NaN")
  accuracy = (logits.argmax(1) == labels).mean()
  below = logits - logits.max(1, keepdims=True)

  def is_confident(log_t: float) -> bool:
    """Whether the mean confidence exceeds the accuracy."""
    confidence = 1 / np.exp(below / math.exp(log_t)).sum(1)
    return bool(confidence.mean() > accuracy)

  low, high = math.log(COLDEST), math.log(HOTTEST)
  if not is_confident(low):
    return COLDEST
  if is_confident(high):
    return HOTTEST
  for _ in range(32):
    middle = (low + high) / 2
    low, high = (middle, high) if is_confident(middle) else (low, middle)
  return math.exp((low + high) / 2)


@trees.tree_class
class VrfState:
  """The arrays and settings of VRF beside its two models.

  A pytree: the bank, temperatures, a, b and alpha are data, so that other
  values compile nothing; k and `squared` are structure.

  Attributes:
    bank: float32 [m, d], unit features of training images that the fine-tuned
      model gets right and the zero-shot one wrong.
    t_zs: float [], the temperature of the zero-shot model's logits, > 0.
    t_ft: float [], the temperature of the fine-tuned model's logits, > 0.
    a: float [], the distance at which both models have the same weight.
    b: float [], the width over which the weight falls around it, > 0.
    alpha: float [], the weight of the fine-tuned model at any distance, in
      [0, 1], if k is 0; else None.
    k: the distance is that to the k-th nearest member; 0 measures none.
    squared: whether distances are squared.
  """

  bank: Any  # arrays, or what JAX puts in their place
  t_zs: Any
  t_ft: Any
  a: Any
  b: Any
  alpha: Any
  k: int = field(metadata=trees.STATIC)
  squared: bool = field(metadata=trees.STATIC)

  def __post_init__(self):
    for name in ("t_zs", "t_ft", "b"):
      value = getattr(self, name)
      if _is_number(value) and not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and > 0, got {value}")
    _check_share(self.alpha)


def vrf_fit(
  zs_logits: Logits,
  ft_logits: Logits,
  labels: Labels,
  ft_feats: Features,
  *,
  k: int | None = None,
  rule: str = "code",
  share: float = 0.001,
  a: Number = 1.5,
  b: Number = 0.6,
  squared: bool = True,
  t_zs: Number | None = None,
  t_ft: Number | None = None,
  zs_held: Held | None = None,
  ft_held: Held | None = None,
  held_labels: HeldLabels | None = None,
  alpha: Number | None = None,
) -> VrfState:
  """Fits variance reduction fine-tuning (VRF), whose weight is by distance.

  Zhu et al. 2024, arXiv 2411.06966, eq. 3: the bank holds the training
  images that the fine-tuned model gets right and the zero-shot model wrong.
  Near these the fine-tuned model gets the larger weight.

  Defaults are those of the authors' code, tuned on ImageNet: squared distances
  in [0, 4], and with them a and b. The paper writes distances in [0, 2]. On
  other data sweep a and b on validation images, never on test images.

  Args:
    zs_logits: the zero-shot model's logits of all training images, [n, k].
    ft_logits: the fine-tuned model's logits of them, [n, k].
    labels: the classes of these images, [n].
    ft_feats: the fine-tuned model's pooled features of them, [n, d].
    k: the distance is that to the k-th nearest member, >= 1; None: by the rule.
    rule: `code`: round(1000 m / n) for m members among n images. It is 0.1% of
      the bank where n is about a million, as in ImageNet, and beyond most of
      the bank where n is a thousand. `paper`: floor(share m). Either is at
      least 1 and at most m.
    share: the share of the bank in the rule `paper`, in (0, 1].
    a: see `VrfState`; 1.5 by default.
    b: see `VrfState`; 0.6 by default.
    squared: whether distances are squared.
    t_zs: the temperature of the zero-shot model; None: found on held images.
    t_ft: the fine-tuned model's temperature; None: found on held images.
    zs_held: the zero-shot model's logits of images that are neither trained nor
      tested on, [held, k].
    ft_held: the fine-tuned model's logits of these images, [held, k].
    held_labels: their classes, [held].
    alpha: in [0, 1], the weight of the fine-tuned model on all images where
      the bank has no k members (our reading; the ensemble is then `ose`).
      None: such a bank is an error.

  Raises:
    ValueError: arrays that don't belong together; neither a temperature nor
      the held images to find it on; a bank too small, without alpha; an
      unknown rule.
  """
  if rule not in RULES:
    raise ValueError(f"unknown rule {rule!r}; there are {RULES}")
  if k is not None and k < 1:
    raise ValueError(f"k must be >= 1, got {k}")
  _check_fit(zs_logits, ft_logits, labels, ft_feats)
  zs_right = losses.correct(zs_logits, labels)
  member = np.asarray(losses.correct(ft_logits, labels) & ~zs_right)
  bank = np.asarray(ft_feats, np.float32)[member]
  n, m = len(labels), len(bank)
  if m < (k or 1):
    if alpha is None:
      lack = f"of fewer than k = {k} members" if m else "without members"
      raise ValueError(
        f"a bank {lack}: of {n} images the fine-tuned model gets {m} right"
        " that the zero-shot one gets wrong; give alpha, a weight for all"
      )
    k = 0
  elif k is None:
    k = round(m / n * 1000) if rule == "code" else math.floor(share * m)
    k = min(max(k, 1), m)
  return VrfState(
    bank=_unit(jnp.asarray(bank)),
    t_zs=_found(t_zs, zs_held, held_labels, "t_zs"),
    t_ft=_found(t_ft, ft_held, held_labels, "t_ft"),
    a=a,
    b=b,
    alpha=None if k else alpha,
    k=k,
    squared=squared,
  )


def _found(
  t: Number | None, logits: Held | None, labels: HeldLabels | None, name: str
) -> Number:
  """Returns the given temperature, or finds it on held images."""
  if t is not None:
    return t
  if logits is None or labels is None:
    raise ValueError(
      f"{name} needs logits and labels of held-out images (zs_held, ft_held,"
      " held_labels), neither of the training nor of the test set; or give"
      f" {name} itself"
    )
  return temperature(logits, labels)


def _check_fit(
  zs_logits: AnyArray, ft_logits: AnyArray, labels: AnyArray, ft_feats: AnyArray
) -> None:
  sizes = {len(ft_logits), len(labels), len(ft_feats)}
  if zs_logits.shape != ft_logits.shape or len(sizes) > 1 or 0 in sizes:
    raise ValueError(
      "expected both models' logits [n, k], labels [n] and features [n, d] of"
      f" the same images, got {zs_logits.shape}, {ft_logits.shape},"
      f" {labels.shape} and {ft_feats.shape}"
    )


def vrf_distance(state: VrfState, ft_feats: Features) -> Float[Array, " b"]:
  """Measures from each image's unit features to the bank's k-th nearest member.

  It is 2 - 2 cos where squared, else its root. Features that are all 0 have no
  direction, and count as orthogonal to every member. Gradients are finite
  everywhere, and 0 at a member.
  """
  # Rounded as on a GPU by default, the cosine of a near member is off by more
  # than the member is.
  cosine = jnp.matmul(
    _unit(ft_feats), state.bank.T, precision=jax.lax.Precision.HIGHEST
  )
  squares = 2 - 2 * jax.lax.top_k(cosine, state.k)[0][:, -1]
  if state.squared:
    return jnp.maximum(squares, 0)
  apart = squares > 0  # the root's slope at 0 is infinite
  return jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1)), 0)


def vrf_predict(
  state: VrfState,
  zs_logits: Logits,
  ft_logits: Logits,
  ft_feats: Features,
  *,
  a: Number | None = None,
  b: Number | None = None,
) -> Logits:
  """Returns log(w softmax(ft / t_ft) + (1 - w) softmax(zs / t_zs)).

  The weight is w = sigmoid((a - distance) / b). Differentiable almost
  everywhere in logits and features, and thus open to attacks as a whole. To
  measure on some of the classes, pick their logits before the call.

  Args:
    state: the state of `vrf_fit`.
    zs_logits: the zero-shot model's logits, [b, k].
    ft_logits: the fine-tuned model's logits, [b, k].
    ft_feats: the fine-tuned model's pooled features, [b, d].
    a: replaces the state's a; None keeps it.
    b: replaces the state's b, > 0; None keeps it.
  """
  if a is not None:
    state = replace(state, a=a)
  if b is not None:
    state = replace(state, b=b)
  if not state.k:
    return ose(zs_logits, ft_logits, state.alpha, state.t_zs, state.t_ft)
  z = (state.a - vrf_distance(state, ft_feats)) / state.b
  z = z.reshape(-1, 1)
  return _mixed(
    zs_logits / state.t_zs,
    ft_logits / state.t_ft,
    jax.nn.log_sigmoid(-z),
    jax.nn.log_sigmoid(z),
  )


# Dataclasses, so that ensembles of equal functions are equal and share a
# compiled program.
@dataclass(frozen=True)
class _Ensemble:
  first: Predict
  second: Any

  @property
  def is_pure(self) -> bool:
    both = (self.first, self.second)
    return all(getattr(member, "is_pure", False) for member in both)


class _OutputSpace(_Ensemble):
  def __call__(self, params: Any, images: Images) -> Logits:
    first, second, *weights = params
    return ose(self.first(first, images), self.second(second, images), *weights)


class _Vrf(_Ensemble):
  def __call__(self, params: Any, images: Images) -> Logits:
    first, second, state = params
    feats, logits = self.second(second, images)
    return vrf_predict(state, self.first(first, images), logits, feats)


def output_space(first: Predict, second: Predict) -> Predict:
  """Returns `(params, images) -> log probabilities` of `ose`.

  Args:
    first: `(variables, images) -> logits` of the zero-shot model.
    second: `(variables, images) -> logits` of the fine-tuned model.

  Returns:
    A function whose params are `(first's variables, second's, alpha)`, or with
    both temperatures, `(first's, second's, alpha, t_first, t_second)`.
  """
  return _OutputSpace(first, second)


def vrf(first: Predict, second: Both) -> Predict:
  """Returns `(params, images) -> log probabilities` of `vrf_predict`.

  Args:
    first: `(variables, images) -> logits` of the zero-shot model.
    second: `(variables, images) -> (features, logits)` of the fine-tuned one,
      from one forward pass.

  Returns:
    A function whose params are `(first's variables, second's, VrfState)`.
  """
  return _Vrf(first, second)


def _mixed(
  first: AnyArray,
  second: AnyArray,
  log_first: PerImageColumn,
  log_second: PerImageColumn,
) -> Logits:
  """Returns the log of two softmaxes' weighted sum, from the weights' logs."""
  if first.shape != second.shape:
    raise ValueError(
      "expected logits of the same images and classes, got"
      f" {first.shape} and {second.shape}"
    )
  return jnp.logaddexp(
    log_first + jax.nn.log_softmax(first),
    log_second + jax.nn.log_softmax(second),
  )


def _unit(feats: Features) -> Features:
  """Scales rows to unit length; those of length 0 stay."""
  squares = jnp.square(feats).sum(1, keepdims=True)
  return feats / jnp.sqrt(jnp.where(squares > 0, squares, 1))


def _is_number(value: Any) -> bool:
  """Whether the value is known: that of a traced array is not."""
  return isinstance(value, int | float | np.ndarray | np.generic)


def _check_share(alpha: Any) -> None:
  if _is_number(alpha) and not 0 <= alpha <= 1:
    raise ValueError(f"alpha must be in [0, 1], got {alpha}")
