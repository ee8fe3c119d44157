"""Geodesic Multi-Modal Mixup (Oh et al. 2023): m2-Mix.

Embeddings are rows of length 1, row i of the images paired with row i of the
texts. A batch is mixed in one ratio. The formulas are those of the authors'
main.py, where the term is weighted by weight_schedule(epoch) * w, with w from
0.001 to 0.05.
"""

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax.models import heads
from roli_jax.types import Array, Bool, Float, Key

REDUCTIONS = ("sum", "mean")
_STRAIGHT = 1 - 1e-6  # the largest cosine of an angle to be mixed on an arc

Embeddings = Float[Array | np.ndarray, "n d"]
Pairs = Bool[Array | np.ndarray, "n n"]
Number = float | int | Float[Array, ""]


def slerp(a: Embeddings, b: Embeddings, ratio: Number) -> Float[Array, "n d"]:
  """Moves each row on the great circle from b (ratio 0) to a (ratio 1).

  The points have length 1 again. Where the cosine is within 1e-6 of 1 or -1 the
  straight mix is brought to length 1 instead (of opposite rows: the nearer one,
  and zeros in the middle), and gradients are finite. That is our own guard, at
  an angle of 1.4e-3: a cosine in float32 hardly tells smaller ones apart. The
  authors have none.
  """
  cosine = (a * b).sum(-1, keepdims=True)
  straight = jnp.abs(cosine) > _STRAIGHT
  # Twice `where`: the branch not taken must have a finite gradient too.
  angle = jnp.arccos(jnp.where(straight, 0.0, cosine))
  arc = jnp.sin(ratio * angle) * a + jnp.sin((1 - ratio) * angle) * b
  line = ratio * a + (1 - ratio) * b
  return jnp.where(straight, heads.unit(line), arc / jnp.sin(angle))


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
    img: the images' embeddings, [n, d].
    txt: the texts' embeddings, [n, d].
    key: draws the ratio, see `draw_ratio`.
    beta: the parameter of that draw, > 0; to go without the term, leave it out.
    tau: the temperature, > 0.
    reduction: `sum` of the two directions, as in the authors' main.py, or
      their `mean`, as in their code for OpenCLIP.
    same: bool [n, n], pairs of one class, where the texts are prompts of
      classes; those off the diagonal count as neither positive nor negative.
      (Our own: the authors' batches repeat no text.)
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
  if not tau > 0:
    raise ValueError(f"tau must be > 0, got {tau}")
  if reduction not in REDUCTIONS:
    raise ValueError(f"unknown reduction {reduction!r}; there are {REDUCTIONS}")
  mixed = slerp(img, txt, ratio)
  positive = (img * txt).sum(-1, keepdims=True)
  paired = jnp.eye(len(img), dtype=bool)

  def direction(x: Embeddings) -> Float[Array, ""]:
    """The mean cross-entropy where row i belongs to column i."""
    logits = jnp.where(paired, positive, x @ mixed.T) / tau
    if same is not None:
      logits = jnp.where(same & ~paired, -jnp.inf, logits)
    return (jax.nn.logsumexp(logits, -1) - jnp.diagonal(logits)).mean()

  both = direction(img) + direction(txt)
  return both if reduction == "sum" else both / 2


def draw_ratio(key: Key[Array, ""], beta: float | int) -> Float[Array, ""]:
  """Draws a batch's ratio from Beta(beta, beta), which is U-shaped below 1.

  The authors take 0.5. In m3-Mix, whose terms draw a ratio each, they take 0.2
  for the term of m2-Mix.
  """
  if not beta > 0:
    raise ValueError(f"beta must be > 0, got {beta}")
  return jax.random.beta(key, beta, beta)


def weight_schedule(epoch: Number) -> Number:
  """Returns the weight of the mixing terms in an epoch, counted from 0."""
  return 1 / (epoch + 1)
