"""Geodesic Multi-Modal Mixup (Oh et al. 2023), and contrastive losses.

Embeddings are rows of length 1, row i of the images paired with row i of the
texts. A batch is mixed in one ratio. The formulas are those of the authors'
main.py, where losses add up as

  contrastive + weight_schedule(epoch) * (w * m2_mix_loss + ...)

with w from 0.001 to 0.05, and for m3-Mix w = 0.01 and `v_mix`, `l_mix`,
`vl_mix` weighted by 0.05, 0.05 and 0.05 to 0.2.
"""

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax.types import Array, Bool, Float, Key

REDUCTIONS = ("sum", "mean")
_STRAIGHT = 1 - 1e-6  # of a cosine
_TINY = 1e-24  # of a squared length

Embeddings = Float[Array | np.ndarray, "n d"]
Pairs = Bool[Array | np.ndarray, "n n"]
Number = float | int | Float[Array, ""]


def slerp(a: Embeddings, b: Embeddings, ratio: Number) -> Float[Array, "n d"]:
  """Each row's point on the great circle from b (ratio 0) to a (ratio 1).

  Of length 1 again. Where the cosine is within 1e-6 of 1 or -1 the straight
  mix is brought to length 1 instead (of opposite rows: the nearer one, and
  zeros in the middle), and gradients are finite. That is our own guard, at an
  angle of 1.4e-3: a cosine in float32 hardly tells smaller ones apart. The
  authors have none.
  """
  cosine = (a * b).sum(-1, keepdims=True)
  straight = jnp.abs(cosine) > _STRAIGHT
  # Twice `where`: the branch not taken must have a finite gradient too.
  angle = jnp.arccos(jnp.where(straight, 0.0, cosine))
  arc = jnp.sin(ratio * angle) * a + jnp.sin((1 - ratio) * angle) * b
  line = ratio * a + (1 - ratio) * b
  return jnp.where(straight, _unit(line), arc / jnp.sin(angle))


def contrastive(
  img: Embeddings,
  txt: Embeddings,
  tau: float | int = 0.01,
  same: Pairs | None = None,
) -> Float[Array, ""]:
  """The mean of the cross-entropies from images to texts and back.

  Args:
    img: the images' embeddings.
    txt: the texts'.
    tau: temperature, > 0; similarities are divided by it.
    same: see `m2_mix_loss`.
  """
  _check_tau(tau)
  logits = _masked(img @ txt.T / tau, same)
  back = _masked(txt @ img.T / tau, same)
  return (_matching(logits) + _matching(back)) / 2


def m2_mix_loss(
  img: Embeddings,
  txt: Embeddings,
  key: Key[Array, ""],
  *,
  beta: float | int = 0.5,
  tau: float | int = 0.07,
  reduction: str = "sum",
  same: Pairs | None = None,
) -> Float[Array, ""]:
  """Contrasts each pair with mixtures of the other pairs' image and text.

  Args:
    img: the images' embeddings.
    txt: the texts'.
    key: draws the ratio, see `draw_ratio`.
    beta: the parameter of that draw, > 0; to go without the term, leave it out.
    tau: temperature, > 0.
    reduction: `sum` of the two directions, as in the authors' main.py, or
      their `mean`, as in their code for OpenCLIP.
    same: pairs of one class, as where the texts are prompts of classes; those
      off the diagonal count as neither positive nor negative. (Our own: the
      authors' batches repeat no text.)
  """
  ratio = draw_ratio(key, beta)
  return m2_mix(img, txt, ratio, tau=tau, reduction=reduction, same=same)


def m2_mix(
  img: Embeddings,
  txt: Embeddings,
  ratio: Number,
  *,
  tau: float | int = 0.07,
  reduction: str = "sum",
  same: Pairs | None = None,
) -> Float[Array, ""]:
  """`m2_mix_loss` at a ratio: at 1 the mixtures are the images, at 0 the texts.

  The positive is the pair as it is; gradients also reach the mixtures.
  """
  _check_tau(tau)
  if reduction not in REDUCTIONS:
    raise ValueError(f"unknown reduction {reduction!r}; there are {REDUCTIONS}")
  mixed = slerp(img, txt, ratio)
  positive = (img * txt).sum(-1, keepdims=True)
  own = jnp.eye(len(img), dtype=bool)
  both = sum(
    _matching(_masked(jnp.where(own, positive, x @ mixed.T) / tau, same))
    for x in (img, txt)
  )
  return both if reduction == "sum" else both / 2


def v_mix(
  img: Embeddings, txt: Embeddings, ratio: Number, *, tau: float | int = 0.01
) -> Float[Array, ""]:
  """Contrasts images mixed with the reversed batch's with the texts.

  An image of i and j = n - 1 - i belongs to text i by `ratio`, and to text j
  by the rest.
  """
  return _soft(slerp(img, img[::-1], ratio), txt, ratio, 1 - ratio, tau)


def l_mix(
  img: Embeddings, txt: Embeddings, ratio: Number, *, tau: float | int = 0.01
) -> Float[Array, ""]:
  """`v_mix` of texts: they are mixed, the images are not."""
  return _soft(img, slerp(txt, txt[::-1], ratio), ratio, 1 - ratio, tau)


def vl_mix(
  img: Embeddings, txt: Embeddings, ratio: Number, *, tau: float | int = 0.01
) -> Float[Array, ""]:
  """Contrasts mixed images with mixed texts, both in the same ratio.

  An image belongs to its own text and to the reversed batch's, to each by 1:
  as the authors have it, targets add up to 2.
  """
  img, txt = (slerp(x, x[::-1], ratio) for x in (img, txt))
  return _soft(img, txt, 1.0, 1.0, tau)


def draw_ratio(key: Key[Array, ""], beta: float | int) -> Float[Array, ""]:
  """A batch's ratio: Beta(beta, beta), which is U-shaped below 1.

  The authors take 0.5. In m3-Mix, whose terms draw a ratio each, they take 0.2
  for the term of m2-Mix.
  """
  if not beta > 0:
    raise ValueError(f"beta must be > 0, got {beta}")
  return jax.random.beta(key, beta, beta)


def weight_schedule(epoch: Number) -> Number:
  """What the mixing terms are multiplied with in an epoch, counted from 0."""
  return 1 / (epoch + 1)


def alignment(img: Embeddings, txt: Embeddings) -> Float[Array, ""]:
  """The mean squared distance within pairs (Wang and Isola 2020, section 4.1).

  0 where each pair is one point; at most 4. Lower is better aligned.
  """
  return jnp.mean(((img - txt) ** 2).sum(-1))


def uniformity(x: Embeddings, t: float | int = 2) -> Float[Array, ""]:
  """log mean exp(-t d^2) over pairs of rows (Wang and Isola 2020, 4.1).

  d is the distance of two rows, each pair once and none with itself. 0 where
  all rows are one point, and down to -4t. Lower is more uniform.

  Raises:
    ValueError: there are fewer than two rows.
  """
  if len(x) < 2:
    raise ValueError(f"uniformity is of at least 2 rows, got {len(x)}")
  first, second = np.triu_indices(len(x), 1)
  lengths = (x * x).sum(-1)
  squared = lengths[first] + lengths[second] - 2 * (x @ x.T)[first, second]
  return jax.nn.logsumexp(-t * squared) - jnp.log(len(first))


def _matching(logits):
  """The mean cross-entropy where row i belongs to column i."""
  return (jax.nn.logsumexp(logits, -1) - jnp.diagonal(logits)).mean()


def _masked(logits, same):
  if same is None:
    return logits
  others = same & ~jnp.eye(len(logits), dtype=bool)
  return jnp.where(others, -jnp.inf, logits)


def _soft(img, txt, own, other, tau):
  """The mean of both directions; j = n - 1 - i belongs to i by `other`."""
  _check_tau(tau)
  eye = jnp.eye(len(img))
  targets = own * eye + other * eye[::-1]  # symmetric
  both = (
    -(targets * jax.nn.log_softmax(logits / tau)).sum(-1).mean()
    for logits in (img @ txt.T, txt @ img.T)
  )
  return sum(both) / 2


def _check_tau(tau: float | int) -> None:
  if not tau > 0:
    raise ValueError(f"tau must be > 0, got {tau}")


def _unit(x):
  """The rows at length 1; a row of almost none becomes zeros."""
  squared = (x * x).sum(-1, keepdims=True)
  known = squared > _TINY
  length = jnp.sqrt(jnp.where(known, squared, 1.0))
  return jnp.where(known, x / length, 0.0)
