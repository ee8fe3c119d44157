"""Is the number to be trusted? What a function and a result give away.

After the checklist of Carlini et al. 2019, "On evaluating adversarial
robustness", the flags of AutoAttack (Croce and Hein 2020) and the indicators
of attack failure (Pintor et al. 2022). These need no attack of their own; those
that do are in `diagnosis`.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import losses
from roli_jax.attacks import Attack
from roli_jax.evaluate.classifier import Classifier

MOST = 64  # images that are looked at
_REACH = 100  # typical gaps below the largest logit, beyond which none decides
_FEW = 16  # images, of which a batch may have too like a neighbour


@dataclasses.dataclass(frozen=True)
class Check:
  """One question about an evaluation, and its answer.

  Attributes:
    name: the name of the check.
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


VERDICTS = ("pass", "info", "warn", "fail")  # each worse than the last


def worst(each: Iterable[Iterable[Check]]) -> list[Check]:
  """The check of the worst verdict by name, from several evaluations."""
  found: dict[str, Check] = {}
  for check in itertools.chain.from_iterable(each):
    known = found.setdefault(check.name, check)
    if VERDICTS.index(check.verdict) > VERDICTS.index(known.verdict):
      found[check.name] = check
  return list(found.values())


def of_outputs(
  function: Classifier,
  images: np.ndarray,
  labels: np.ndarray,
  indices: np.ndarray,
  clean: np.ndarray,
  logits: np.ndarray,
) -> list[Check]:
  """What the outputs on clean images say, from a few passes more.

  Args:
    function: the function.
    images: the clean ones; the first 64 are looked at.
    labels: their classes.
    indices: who they are.
    clean: whom the judge found right.
    logits: the logits of all of them, [n, k].
  """
  few = slice(0, MOST)
  images, labels, indices = images[few], labels[few], indices[few]
  clean, logits = clean[few], logits[few].astype(np.float64)
  return [
    _accuracy(clean, logits.shape[1], indices),
    _alone(function, images, labels, indices, logits),
    _logits(logits, indices),
    _scale(logits, indices),
    _deterministic(function, images, labels, indices, logits),
  ]


def _accuracy(clean, num_classes, indices):
  right, chance = clean.mean(), 1 / num_classes
  return judged(
    "clean accuracy",
    "warn",
    f"{100 * right:.1f}% of {len(clean)} images, chance is {100 * chance:.1f}%"
    + ("" if right > chance else ": do labels and preprocessing fit?"),
    indices if right <= chance else (),
  )


def moved(logits: np.ndarray, others: np.ndarray) -> np.ndarray:
  """How far each image's logits lie apart, as a share of their length.

  Their length is what decides: that of the distances below the largest logit,
  of classes which are not out of reach. A number added to all of them, or a
  class at -1e9, would hide any change otherwise.

  Args:
    logits: [n, k].
    others: [n, k], of the same images.

  Returns:
    [n], inf where one of them masks a class (-inf) and the other doesn't, or
    is no number.
  """
  a, b = (x.astype(np.float64) for x in (logits, others))
  masked = np.isneginf(a)
  same = (masked == np.isneginf(b)).all(1)
  rounding = 4 * 2.0**-24 * np.abs(np.where(masked, 0, a)).max(1, initial=0)
  with np.errstate(invalid="ignore", over="ignore"):
    a, b = a - a.max(1, keepdims=True), b - b.max(1, keepdims=True)
    gaps = -np.sort(a, axis=1)[:, -2]
    gap = np.median(gaps[np.isfinite(gaps)]) if np.isfinite(gaps).any() else 1
    counts = ~masked & (a > -_REACH * max(gap, 1e-12))
    length = np.linalg.norm(np.where(counts, a, 0), axis=1)
    far = np.linalg.norm(np.where(counts, b - a, 0), axis=1)
    floor = rounding * np.sqrt(counts.sum(1))
    apart = np.maximum(far - floor, 0) / np.maximum(np.maximum(length, gap),
                                                    1e-12)  # fmt: skip
  return np.where(same & np.isfinite(apart), apart, np.inf)


def _alone(function, images, labels, indices, logits):
  """Whether an image's logits depend on who stands beside it."""
  if function.stochastic:
    return Check("batch", "info", "each image of a random function is alone")
  # In another order, which takes every group of eight apart, and each beside
  # its negative, without which a single group would keep its members.
  order = np.concatenate([np.arange(k, len(images), 8) for k in range(8)])
  negatives = images.min() + images.max() - images
  beside = np.stack([images, negatives], 1)[order]
  *_, mixed = function.judge(
    beside.reshape(-1, *images.shape[1:]),
    labels[order].repeat(2),
    indices[order].repeat(2),
  )
  off = np.zeros(len(images))
  off[order] = moved(logits[order], mixed[::2])
  if len(images) <= _FEW:  # among seven of itself, and not the first
    each = (x.repeat(8, axis=0) for x in (images, labels, indices))
    *_, alone = function.judge(*each)
    off = np.maximum(off, moved(logits, alone[3::8]))
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
  least = np.min(logits, axis=1, initial=np.inf, where=logits > -np.inf)
  spread = float(np.median(logits.max(1) - least))
  bad = not 0.1 <= spread <= 1e3
  return judged(
    "scale",
    "warn",
    f"logits span {spread:.3g} (median)"
    + (": a temperature can mask gradients of cross-entropy" if bad else ""),
    indices if bad else (),
  )


def _deterministic(function, images, labels, indices, logits):
  if function.stochastic:
    return Check("deterministic", "info", "random, as declared: 20 draws judge")
  if function.programs.is_fickle:
    return judged(
      "deterministic",
      "fail",
      "each trace is another function: does it draw random numbers by NumPy or"
      " Python? Let it take a key, stochastic=True",
      indices,
    )
  worst = np.zeros(len(logits))
  for _ in range(4):
    *_, again = function.judge(images, labels, indices)
    worst = np.maximum(worst, moved(logits, again))
  return judged(
    "deterministic",
    "fail",
    f"in 5 passes logits move by {worst.max():.1e} of their length"
    + ("" if worst.max() <= 1e-4 else ": let it take a key, stochastic=True"),
    indices[worst > 1e-4],
  )


def of_gradients(
  function: Classifier,
  images: np.ndarray,
  labels: np.ndarray,
  indices: np.ndarray,
) -> tuple[Check, np.ndarray]:
  """Whether there are gradients for attacks to climb, at these clean images.

  Costs a forward and a backward pass of each.

  Returns:
    The check, and the gradients' L1 norms; none where there are no gradients.
  """
  none = np.zeros(0, np.float32)
  name = "gradients finite"
  if function.programs.no_slope:
    return Check(
      name, "info",
      f"the function has no derivative ({function.programs.no_slope}): only"
      " attacks that need none can be made",
    ), none  # fmt: skip
  if not len(images):
    said = "no image to look at is classified as labelled"
    return Check(name, "info", said), none
  strange, flat, length = function.slopes(images, labels, indices)
  many = flat.sum() > max(1, 0.01 * len(flat))
  said = f"of {len(images)} images {strange.sum()} have gradients with values"
  said += f" that are not finite, {flat.sum()} gradients that are all 0"
  if strange.any():
    said += "; attacks take such values for 0, and may be blind"
  if many:
    said += "; attacks that climb them stand still"
  found = judged(name, "warn", said, indices[strange | (flat & many)])
  return found, length


def of_result(
  clean: np.ndarray,
  broken_by: np.ndarray,
  indices: np.ndarray,
  invalid: np.ndarray,
  strange: np.ndarray,
) -> list[Check]:
  """What the outcome of attacks says.

  Args:
    clean: who is right before any attack.
    broken_by: the name of the attack that broke each image, [n].
    indices: who they are.
    invalid: for whom an attack left the ball or the box.
    strange: who was broken by logits that are NaN or infinite.
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
    judged(
      "finite logits",
      "warn",
      f"{int(strange.sum())} of {count} images count as broken by logits that"
      " are NaN or infinite",
      indices[strange],
    ),
  ]


def check_numbers(logits: np.ndarray, indices: np.ndarray) -> None:
  """Raises a ValueError for logits that say of no class that it is first.

  -inf is the lowest logit: of a class that is masked.
  """
  bad = ~losses.is_ranking(logits)
  if not bad.any():
    return
  of = logits[bad]
  seen = [
    what
    for what, found in (
      ("NaN", np.isnan(of).any()),
      ("+inf", np.isposinf(of).any()),
      ("-inf for every class", np.isneginf(of).all(1).any()),
    )
    if found
  ]
  raise ValueError(
    f"the logits of {int(bad.sum())} of {len(bad)} clean images are not numbers"
    f" ({', '.join(seen)}), first of image {indices[bad][0]}: attacks would"
    " mean nothing. Does a low precision overflow?"
  )


def check_shape(images: np.ndarray) -> None:
  """Raises a ValueError for what is no batch of images."""
  if images.ndim < 2 or not len(images):
    raise ValueError(f"expected images [n, h, w, c], got {images.shape}")


def check_inputs(
  images: np.ndarray, labels: np.ndarray, indices: np.ndarray, attack: Any
) -> None:
  """Raises a ValueError for images, labels, indices or radii of no sense."""
  n = len(images)
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
      f"expected floating-point images in [0, 1], got {images.dtype};"
      " divide by 255?"
    )
  if attack is not None and not isinstance(attack, Attack):
    raise ValueError(
      "expected an attack, from attacks.build(name, threat) or of a class of"
      " your own under attacks.Attack, got"
      f" {attack!r:.80}"
    )
  if attack is not None and jax.tree_util.all_leaves([attack]):
    raise ValueError(
      f"{type(attack).__name__} is no pytree: put"
      " @jax.tree_util.register_dataclass above its class"
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
  if not np.all(np.isfinite(eps) & (eps >= 0)):
    raise ValueError(f"eps must be finite and >= 0, got {eps.min()}")
  step_size = getattr(attack, "step_size", None)
  if step_size is not None and np.ndim(step_size):
    raise ValueError(
      "evaluation takes one step_size for all images, got one for each; None"
      " is a quarter of each image's eps"
    )


def check_function(
  function: Classifier, labels: np.ndarray, attack: Any
) -> None:
  """Raises a ValueError for labels or an attack that the function can't bear.

  Attacks without a backward pass need no derivative.
  """
  num_classes = function.programs.num_classes
  if labels.min() < 0 or labels.max() >= num_classes:
    raise ValueError(
      f"expected labels in [0, {num_classes}), the width of the logits, got"
      f" {labels.min()} to {labels.max()}"
    )
  if attack is not None and attack.loss == "kl":
    raise ValueError(
      "the loss kl climbs from clean logits, in training; here take ce, margin"
      " or dlr"
    )
  if function.programs.no_slope and attack is not None and attack.passes[1]:
    raise ValueError(
      f"{attack.name} climbs gradients, and the function has none"
      f" ({function.programs.no_slope}); take `square`, or give it a derivative"
      " with jax.custom_vjp (docs/evaluation.md)"
    )
