"""Is the number to be trusted? What a function and a result give away.

After the checklist of Carlini et al. 2019, "On evaluating adversarial
robustness", the flags of AutoAttack (Croce and Hein 2020) and the indicators
of attack failure (Pintor et al. 2022). These need no attack of their own; those
that do are in `diagnosis`.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import keys
from roli_jax.classifier import SMALLEST, Classifier

MOST = 64  # images that are looked at


@dataclasses.dataclass(frozen=True)
class Check:
  """One question about an evaluation, and its answer.

  Attributes:
    name: of the check.
    verdict: `pass`, `info`, `warn` (the number may flatter) or `fail` (it is
      not to be trusted).
    said: what was seen, in a line.
    images: indices of those concerned.
  """

  name: str
  verdict: str
  said: str
  images: tuple[int, ...] = ()

  def plain(self) -> dict[str, Any]:
    """As plain values, without the name."""
    return {
      "verdict": self.verdict,
      "said": self.said,
      "images": list(self.images),
    }


def judged(
  name: str, verdict: str, said: str, concerned: Iterable[Any] = ()
) -> Check:
  """A check with that verdict if any image is concerned; else it passes."""
  images = tuple(int(index) for index in concerned)
  return Check(name, verdict if images else "pass", said, images)


def of_outputs(
  on: Classifier,
  images: np.ndarray,
  labels: np.ndarray,
  indices: np.ndarray,
  logits: np.ndarray,
) -> list[Check]:
  """What the outputs on clean images say, from a few passes more.

  Args:
    on: the function.
    images: the clean ones; the first 64 are looked at.
    labels: their classes.
    indices: who they are.
    logits: of all of them.
  """
  few = slice(0, MOST)
  images, labels, indices = images[few], labels[few], indices[few]
  logits = logits[few].astype(np.float64)
  return [
    _accuracy(logits, labels, indices),
    _alone(on, images, labels, indices, logits),
    _logits(logits, indices),
    _scale(logits, indices),
    _deterministic(on, images, labels, indices, logits),
  ]


def _accuracy(logits, labels, indices):
  right = (logits.argmax(1) == labels).mean()
  chance = 1 / logits.shape[1]
  return judged(
    "clean accuracy",
    "warn",
    f"{100 * right:.1f}% of {len(labels)} images, chance is {100 * chance:.1f}%"
    + ("" if right > chance else ": do labels and preprocessing fit?"),
    indices if right <= chance else (),
  )


def _unit(logits):
  length = np.linalg.norm(logits, axis=1, keepdims=True)
  return logits / np.maximum(length, 1e-12)


def _alone(on, images, labels, indices, logits):
  """Whether an image's logits depend on who stands beside it."""
  if on.stochastic:
    return Check("batch", "info", "each image of a random function is alone")
  *_, mixed = on.judge(images[::-1], labels[::-1], indices[::-1])
  off = np.abs(_unit(mixed[::-1].astype(np.float64)) - _unit(logits)).max(1)
  return judged(
    "batch",
    "fail",
    f"in another batch logits move by {off.max():.1e} of their length"
    + ("" if off.max() <= 1e-3 else ": is batch norm in training mode?"),
    indices[off > 1e-3],
  )


def _logits(logits, indices):
  sums = np.abs(logits.sum(1) - 1) < 1e-4
  within = ((logits >= 0) & (logits <= 1)).all(1)
  likely = sums & within
  are = likely.all()
  return judged(
    "logits",
    "warn",
    "outputs look like probabilities, which hide gradients: return logits, or"
    " their log"
    if are
    else "outputs are no probabilities",
    indices if are else (),
  )


def _scale(logits, indices):
  spread = float(np.median(logits.max(1) - logits.min(1)))
  bad = not 0.1 <= spread <= 1e3
  return judged(
    "scale",
    "warn",
    f"logits span {spread:.3g} (median)"
    + (": a temperature can mask gradients of cross-entropy" if bad else ""),
    indices if bad else (),
  )


def _deterministic(on, images, labels, indices, logits):
  if on.stochastic:
    return Check("deterministic", "info", "random, as declared: 20 draws judge")
  unit, worst = _unit(logits), np.zeros(len(logits))
  for _ in range(4):
    *_, again = on.judge(images, labels, indices)
    moved = np.linalg.norm(_unit(again.astype(np.float64)) - unit, axis=1)
    worst = np.maximum(worst, moved)
  return judged(
    "deterministic",
    "fail",
    f"in 5 passes logits move by {worst.max():.1e} of their length"
    + ("" if worst.max() <= 1e-4 else ": let it take a key, stochastic=True"),
    indices[worst > 1e-4],
  )


def of_result(
  clean: np.ndarray,
  broken_by: np.ndarray,
  indices: np.ndarray,
  invalid: np.ndarray,
) -> list[Check]:
  """What the outcome of attacks says.

  Args:
    clean: who is right before any attack.
    broken_by: of each image, the attack's name.
    indices: who they are.
    invalid: for whom an attack left the ball or the box.
  """
  count = max(int(clean.sum()), 1)
  by_square = np.flatnonzero(broken_by == "square")
  alone = not set(np.unique(broken_by)) - {"", "clean", "square"}
  many = len(by_square) > 0.002 * count and not alone
  return [
    judged(
      "ball_and_box",
      "fail",
      f"{int(invalid.sum())} images outside, measured in float64: no breaks",
      indices[invalid],
    ),
    judged(
      "white_box",
      "warn",
      f"{len(by_square)} of {count} images fell to Square alone"
      + (": gradients may be masked" if many else ""),
      indices[by_square] if many else (),
    ),
  ]


@functools.partial(jax.jit, static_argnums=0)  # its shapes are remembered
def _outputs(fn, params, images, image_keys):
  return fn(params, images, image_keys)


def check_numbers(logits: np.ndarray, indices: np.ndarray) -> None:
  """Raises a ValueError for logits that are not numbers."""
  bad = np.isnan(logits).any(1)
  if bad.any():
    raise ValueError(
      f"the logits of {int(bad.sum())} of {len(bad)} clean images are not"
      f" numbers (NaN), first of image {indices[bad][0]}: attacks would mean"
      " nothing"
    )


def check_inputs(
  on: Classifier,
  images: np.ndarray,
  labels: np.ndarray,
  indices: np.ndarray,
  attack: Any,
) -> None:
  """Raises a ValueError for inputs, or a function, that can't be meant."""
  n = len(images)
  if n == 0 or images.ndim < 2:
    raise ValueError(f"expected images [n, h, w, c], got {images.shape}")
  if not np.issubdtype(images.dtype, np.floating):
    raise ValueError(
      f"expected floating-point images in [0, 1], got {images.dtype};"
      " divide by 255?"
    )
  low, high = (attack.threat.low, attack.threat.high) if attack else (0, 1)
  if not np.all((images >= low) & (images <= high)):
    raise ValueError(
      f"expected images in [{low}, {high}], got values in"
      f" [{images.min()}, {images.max()}]; normalise inside the function"
    )
  for name, values in (("labels", labels), ("indices", indices)):
    if values.shape != (n,) or not np.issubdtype(values.dtype, np.integer):
      raise ValueError(
        f"expected {name} as {n} integers, got {values.dtype} {values.shape}"
      )
  eps = np.asarray(attack.threat.eps) if attack else np.zeros(())
  if eps.shape not in ((), (n,)):
    raise ValueError(f"expected one eps, or {n} of them, got {eps.shape}")
  b = SMALLEST
  piece = jax.ShapeDtypeStruct((b, *images.shape[1:]), jnp.float32)
  image_keys = jax.eval_shape(keys.per_image, keys.root(0), jnp.arange(b))
  out = jax.eval_shape(
    functools.partial(_outputs, on.fn), on.params, piece, image_keys
  )
  if getattr(out, "ndim", None) != 2 or out.shape[0] != b:
    raise ValueError(
      f"expected logits [{b}, classes] for {b} images, got"
      f" {getattr(out, 'shape', type(out).__name__)}"
    )
  if out.shape[1] < 2:
    raise ValueError("expected logits of at least 2 classes, got 1")
  if labels.min() < 0 or labels.max() >= out.shape[1]:
    raise ValueError(
      f"expected labels in [0, {out.shape[1]}), the width of the logits, got"
      f" {labels.min()} to {labels.max()}"
    )
