"""Two classifiers as one: mixed in their weights, or in what they say.

The first is the zero-shot model, or the robust backbone with its linear probe;
the second is the one that was fine-tuned from it. What comes out are log
probabilities: logits to attacks and judges like any others.

An ensemble is attacked as a whole, through both models and the weight between
them: what fools one of the two may leave the other right, and attacks on one
overstate the robustness of both. Yet the way through VRF's weight is bent, and
now and then an attack on one model finds what that on the whole misses. Judge
the ensemble on both, and on a black-box attack.
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

COLDEST, HOTTEST = 0.1, 10.0  # temperatures that are looked at, as in the code
RULES = ("code", "paper")


def wse(first: PyTree, second: PyTree, alpha: Number) -> PyTree:
  """(1 - alpha) first + alpha second, leaf by leaf (WiSE-FT, weight space).

  Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", section 3.
  Running statistics are mixed like weights where the trees hold them. The
  models of the paper have none: that is our reading.

  Args:
    first: a tree of floats, such as `(params, stats)`.
    second: one of the same names and shapes.
    alpha: in [0, 1]; 0 is the first, 1 the second, exactly.

  Raises:
    ValueError: trees that differ, or an alpha that is no share.
  """
  _check_share(alpha)
  trees.check_same(second, first, "the second model")

  def mixed(x, y):
    share = jnp.asarray(alpha, x.dtype)
    return (1 - share) * x + share * y

  return jax.tree.map(mixed, first, second)


def ose(
  first_logits: Logits,
  second_logits: Logits,
  alpha: Number,
  t_first: Number = 1,
  t_second: Number = 1,
) -> Logits:
  """log((1 - alpha) softmax(first / t) + alpha softmax(second / t)).

  The output-space ensemble that VRF is compared with: one weight for all
  images.

  Args:
    first_logits: the zero-shot model's logits, [b, k].
    second_logits: the fine-tuned model's logits, [b, k].
    alpha: in [0, 1]; 0 is the first, 1 the second. Data, like temperatures.
    t_first: the temperature of the first.
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
  """The T at which the mean of max softmax(logits / T) equals the accuracy.

  Within [0.1, 10]; the nearer end where no T in between will do, as for a
  model that is always right. The mean confidence falls with T, so halving
  finds it. The authors' code (VRF, Zhu et al. 2024) takes steps of regula falsi
  to a gap of 0.001, and goes beyond the ends.

  Args:
    logits: of images that the model was not fitted to, and never of the test
      set.
    labels: their classes.

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

  def is_confident(log_t):
    """Whether the mean confidence exceeds the accuracy."""
    return (1 / np.exp(below / math.exp(log_t)).sum(1)).mean() > accuracy

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
  """What VRF knows beside its two models.

  A pytree: the bank, temperatures, a, b and alpha are data, so that others
  compile nothing; k and the kind of distance are structure.

  Attributes:
    bank: [m, d], unit features of training images that the fine-tuned model
      gets right and the zero-shot one wrong.
    t_zs: the temperature of the zero-shot model's logits.
    t_ft: the temperature of the fine-tuned model's logits.
    a: the distance at which both models weigh the same.
    b: how gently the weight falls around it, above 0.
    alpha: of the fine-tuned model, at any distance, where k is 0; else None.
    k: which of the nearest members is measured to; 0: no distance is.
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
  """Variance reduction fine-tuning: whom to trust, by the distance to a bank.

  Zhu et al. 2024, arXiv 2411.06966, eq. 3: the bank holds the training
  images that the fine-tuned model gets right and the zero-shot model wrong.
  Near these the fine-tuned model is to be trusted.

  Defaults are those of the authors' code, tuned on ImageNet: squared distances
  in [0, 4], and with them a and b. The paper writes distances in [0, 2]. On
  other data sweep a and b on validation images, never on test images.

  Args:
    zs_logits: the zero-shot model's logits of all training images, [n, k].
    ft_logits: the fine-tuned model's logits.
    labels: the classes of these images.
    ft_feats: the fine-tuned model's pooled features of them.
    k: which nearest member to measure to; None: by the rule.
    rule: `code`: round(1000 m / n) for m members among n images. It is 0.1% of
      the bank where n is about a million, as in ImageNet, and beyond most of
      the bank where n is a thousand. `paper`: floor(share m). Either is at
      least 1 and at most m.
    share: what the rule `paper` takes of the bank, in (0, 1].
    a: see `VrfState`.
    b: see `VrfState`.
    squared: whether distances are squared.
    t_zs: the temperature of the zero-shot model; None: found on held images.
    t_ft: the fine-tuned model's temperature.
    zs_held: logits of images that are neither trained on nor tested on.
    ft_held: the fine-tuned model's on these.
    held_labels: their classes.
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


def _found(t, logits, labels, name):
  """The temperature as given, or as held images say."""
  if t is not None:
    return t
  if logits is None or labels is None:
    raise ValueError(
      f"{name} needs logits and labels of held-out images (zs_held, ft_held,"
      " held_labels), neither of the training nor of the test set; or give"
      f" {name} itself"
    )
  return temperature(logits, labels)


def _check_fit(zs_logits, ft_logits, labels, ft_feats):
  sizes = {len(ft_logits), len(labels), len(ft_feats)}
  if zs_logits.shape != ft_logits.shape or len(sizes) > 1 or 0 in sizes:
    raise ValueError(
      "expected both models' logits [n, k], labels [n] and features [n, d] of"
      f" the same images, got {zs_logits.shape}, {ft_logits.shape},"
      f" {labels.shape} and {ft_feats.shape}"
    )


def vrf_distance(state: VrfState, ft_feats: Features) -> Float[Array, "b"]:
  """From each image's unit features to the k-th nearest member of the bank.

  2 - 2 cos where squared, its root otherwise. Features that are all 0 have no
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
  """log(w softmax(ft / t_ft) + (1 - w) softmax(zs / t_zs)), w by the distance.

  Differentiable almost everywhere in logits and features, and thus open to
  attacks as a whole. Who measures on some of the classes picks their logits
  before.

  Args:
    state: from `vrf_fit`.
    zs_logits: the zero-shot model's logits, [b, k].
    ft_logits: the fine-tuned model's logits.
    ft_feats: the fine-tuned model's pooled features.
    a: in place of the state's.
    b: in place of the state's.
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


# Of equal functions they are equal, and share what is compiled where those do.
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
    of_first, of_second, *weights = params
    return ose(
      self.first(of_first, images), self.second(of_second, images), *weights
    )


class _Vrf(_Ensemble):
  def __call__(self, params: Any, images: Images) -> Logits:
    of_first, of_second, state = params
    feats, logits = self.second(of_second, images)
    return vrf_predict(state, self.first(of_first, images), logits, feats)


def output_space(first: Predict, second: Predict) -> Predict:
  """`(params, images) -> log probabilities` of `ose`.

  Args:
    first: `(variables, images) -> logits` of the zero-shot model.
    second: the fine-tuned model's forward pass.

  Returns:
    A function whose params are `(first's variables, second's, alpha)`, or with
    both temperatures, `(first's, second's, alpha, t_first, t_second)`.
  """
  return _OutputSpace(first, second)


def vrf(first: Predict, second: Both) -> Predict:
  """`(params, images) -> log probabilities` of `vrf_predict`.

  Args:
    first: `(variables, images) -> logits` of the zero-shot model.
    second: `(variables, images) -> (features, logits)` of the fine-tuned one,
      from one forward pass.

  Returns:
    A function whose params are `(first's variables, second's, VrfState)`.
  """
  return _Vrf(first, second)


def _mixed(first, second, log_first, log_second):
  """The log of two softmaxes' weighted sum, from the logs of the weights."""
  if first.shape != second.shape:
    raise ValueError(
      "expected logits of the same images and classes, got"
      f" {first.shape} and {second.shape}"
    )
  return jnp.logaddexp(
    log_first + jax.nn.log_softmax(first),
    log_second + jax.nn.log_softmax(second),
  )


def _unit(feats):
  """Rows of unit length; those of length 0 as they are."""
  squares = jnp.square(feats).sum(1, keepdims=True)
  return feats / jnp.sqrt(jnp.where(squares > 0, squares, 1))


def _is_number(value: Any) -> bool:
  """Whether it can be looked at: traced values can't."""
  return isinstance(value, int | float | np.ndarray | np.generic)


def _check_share(alpha: Any) -> None:
  if _is_number(alpha) and not 0 <= alpha <= 1:
    raise ValueError(f"alpha must be in [0, 1], got {alpha}")
