"""May the number be believed? Tests that each evaluation makes of itself.

A `Check` is one named test of whether robust accuracy can be trusted, with its
verdict and the images that it is about. Those in this module are made in every
evaluation, from clean outputs, gradients and the attacks' results, in a few
passes. `diagnosis` has those that need attacks of their own, and is run beside
an evaluation. Neither refuses anything: arguments that can't be meant are
`inputs`' business.

After the checklist of Carlini et al. 2019, "On evaluating adversarial
robustness", the flags of AutoAttack (Croce and Hein 2020) and the indicators
of attack failure (Pintor et al. 2022).
"""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from roli_jax.evaluate.classifier import Classifier, Examples

MOST = 64  # images that are looked at
_REACH = 100  # typical gaps below the largest logit, beyond which none decides
_FEW = 16  # images, of which a batch may have too like a neighbour
_CHANGED = 1e-3  # of the logits' length: another batch than rounding explains
_DRAWN = 1e-4  # of it: the same batch gave other logits


@dataclasses.dataclass(frozen=True)
class Check:
  """One test of an evaluation, and what came of it.

  Attributes:
    name: the name of the test.
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
  name: str,
  verdict: str,
  finding: str,
  concerned: Iterable[int | np.integer] = (),
) -> Check:
  """A check with that verdict if any image is concerned; else it passes.

  Args:
    name: the name of the check.
    verdict: the check's if there are such images.
    finding: what was seen, in a line; also where it passes.
    concerned: indices of the images.
  """
  images = tuple(int(index) for index in concerned)
  return Check(name, verdict if images else "pass", finding, images)


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
  examples: Examples,
  clean: np.ndarray,
  logits: np.ndarray,
) -> list[Check]:
  """The checks of outputs on clean images, from a few passes more.

  Args:
    function: the function.
    examples: the clean images; the first 64 are looked at.
    clean: whom the judge found right, bool [n].
    logits: their logits, [n, k].
  """
  few = slice(0, MOST)
  examples, clean = examples[few], clean[few]
  logits = logits[few].astype(np.float64)
  accuracy = _accuracy(clean, logits.shape[1], examples.indices)
  return [
    *([] if function.targeted else [accuracy]),  # targets are no labels
    _alone(function, examples, logits),
    _logits(logits, examples.indices),
    _scale(logits, examples.indices),
    _deterministic(function, examples, logits),
  ]


def _accuracy(
  clean: np.ndarray, num_classes: int, indices: np.ndarray
) -> Check:
  """Warns where no more are right than by chance."""
  right, chance = clean.mean(), 1 / num_classes
  finding = (
    f"{100 * right:.1f}% of {len(clean)} images, chance is {100 * chance:.1f}%"
  )
  if right > chance:
    return judged("clean accuracy", "warn", finding)
  finding += ": do labels and preprocessing fit?"
  return judged("clean accuracy", "warn", finding, indices)


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
  # Four roundings of a float32, whose last bit is worth 2**-24.
  rounding = 4 * 2.0**-24 * np.abs(np.where(masked, 0, a)).max(1, initial=0)
  with np.errstate(invalid="ignore", over="ignore"):
    a, b = a - a.max(1, keepdims=True), b - b.max(1, keepdims=True)
    gaps = -np.sort(a, axis=1)[:, -2]
    gap = np.median(gaps[np.isfinite(gaps)]) if np.isfinite(gaps).any() else 1
    counts = ~masked & (a > -_REACH * max(gap, 1e-12))
    length = np.linalg.norm(np.where(counts, a, 0), axis=1)
    far = np.linalg.norm(np.where(counts, b - a, 0), axis=1)
    floor = rounding * np.sqrt(counts.sum(1))
    scale = np.maximum(np.maximum(length, gap), 1e-12)
    apart = np.maximum(far - floor, 0) / scale
  return np.where(same & np.isfinite(apart), apart, np.inf)


def _alone(
  function: Classifier, examples: Examples, logits: np.ndarray
) -> Check:
  """Fails where an image's logits depend on who stands beside it."""
  if function.stochastic:
    return Check("batch", "info", "each image of a random function is alone")
  images = examples.images
  # In another order, which takes every group of eight apart, and each beside
  # its negative, without which a single group would keep its members.
  order = np.concatenate([np.arange(k, len(images), 8) for k in range(8)])
  negatives = images.min() + images.max() - images
  pairs = np.stack([images, negatives], 1)[order]
  beside = dataclasses.replace(
    examples[order.repeat(2)], images=pairs.reshape(-1, *images.shape[1:])
  )
  *_, mixed = function.judge(beside)
  off = np.zeros(len(images))
  off[order] = moved(logits[order], mixed[::2])
  if len(images) <= _FEW:  # among seven of itself, and not the first
    *_, alone = function.judge(examples[np.arange(len(images)).repeat(8)])
    off = np.maximum(off, moved(logits, alone[3::8]))
  finding = f"in another batch logits move by {off.max():.1e} of their length"
  if off.max() > _CHANGED:
    finding += ": is batch norm in training mode?"
  return judged("batch", "fail", finding, examples.indices[off > _CHANGED])


def _logits(logits: np.ndarray, indices: np.ndarray) -> Check:
  """Warns of outputs that lie in [0, 1] and sum to 1."""
  sums = np.abs(logits.sum(1) - 1) < 1e-4
  within = ((logits >= 0) & (logits <= 1)).all(1)
  if not (sums & within).all():
    return judged("logits", "warn", "outputs are no probabilities")
  finding = (
    "outputs look like probabilities, which hide gradients: return logits, or"
    " their log"
  )
  return judged("logits", "warn", finding, indices)


def _scale(logits: np.ndarray, indices: np.ndarray) -> Check:
  """Warns of logits that span less than 0.1 or more than 1,000."""
  least = np.min(logits, axis=1, initial=np.inf, where=logits > -np.inf)
  spread = float(np.median(logits.max(1) - least))
  finding = f"logits span {spread:.3g} (median)"
  if 0.1 <= spread <= 1e3:
    return judged("scale", "warn", finding)
  finding += ": a temperature can mask gradients of cross-entropy"
  return judged("scale", "warn", finding, indices)


def _deterministic(
  function: Classifier, examples: Examples, logits: np.ndarray
) -> Check:
  """Fails where the same images have other logits in another pass."""
  name = "deterministic"
  if function.stochastic:
    return Check(name, "info", "random, as declared: 20 draws judge")
  if function.programs.is_fickle:
    finding = (
      "each trace is another function: does it draw random numbers by NumPy or"
      " Python? Let it take a key, stochastic=True"
    )
    return judged(name, "fail", finding, examples.indices)
  off = np.zeros(len(logits))
  for _ in range(4):
    *_, again = function.judge(examples)
    off = np.maximum(off, moved(logits, again))
  finding = f"in 5 passes logits move by {off.max():.1e} of their length"
  if off.max() > _DRAWN:
    finding += ": let it take a key, stochastic=True"
  return judged(name, "fail", finding, examples.indices[off > _DRAWN])


def of_gradients(
  function: Classifier, examples: Examples
) -> tuple[Check, np.ndarray]:
  """Whether there are gradients for attacks to climb, at these clean images.

  Costs a forward and a backward pass of each.

  Returns:
    The check, and the gradients' L1 norms, [n]; [0] where there are none.
  """
  none = np.zeros(0, np.float32)
  name, no_slope = "gradients finite", function.programs.no_slope
  if no_slope:
    finding = (
      f"the function has no derivative ({no_slope}): only attacks that need"
      " none can be made"
    )
    return Check(name, "info", finding), none
  if not len(examples):
    finding = "no image to look at is classified as labelled"
    return Check(name, "info", finding), none
  strange, flat, length = function.slopes(examples)
  many = flat.sum() > max(1, 0.01 * len(flat))
  finding = (
    f"of {len(flat)} images {strange.sum()} have gradients with values that"
    f" are not finite, {flat.sum()} gradients that are all 0"
  )
  if strange.any():
    finding += "; attacks take such values for 0, and may be blind"
  if many:
    finding += "; attacks that climb them stand still"
  concerned = examples.indices[strange | (flat & many)]
  return judged(name, "warn", finding, concerned), length


def of_result(
  clean: np.ndarray,
  broken_by: np.ndarray,
  indices: np.ndarray,
  invalid: np.ndarray,
  strange: np.ndarray,
) -> list[Check]:
  """The checks of what the attacks have done; arrays of one entry an image.

  Args:
    clean: who is right before any attack, bool [n].
    broken_by: the name of the attack that broke each image, [n].
    indices: who they are, [n].
    invalid: for whom an attack left the ball or the box, bool [n].
    strange: who was broken by logits that are NaN or infinite, bool [n].
  """
  count = max(int(clean.sum()), 1)
  by_square = np.flatnonzero(broken_by == "square")
  gradients_were_tried = set(np.unique(broken_by)) - {"", "clean", "square"}
  masked = len(by_square) > 0.002 * count and gradients_were_tried
  outside = f"{invalid.sum()} images outside, measured in float64: no breaks"
  alone = f"{len(by_square)} of {count} images fell to Square alone"
  if masked:
    alone += ": gradients may be masked"
  no_numbers = (
    f"{strange.sum()} of {count} images count as broken by logits that are NaN"
    " or infinite"
  )
  blind = indices[by_square] if masked else ()
  return [
    judged("ball_and_box", "fail", outside, indices[invalid]),
    judged("white_box", "warn", alone, blind),
    judged("finite logits", "warn", no_numbers, indices[strange]),
  ]
