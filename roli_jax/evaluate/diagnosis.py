"""Would a sceptic believe it? Attacks that look for what attacks overlook.

A robust accuracy is an upper bound: a better attack may break more. This module
asks of a function what hints at such an attack: are there gradients, and are
they right; do more steps, other losses, random noise or an attack without
gradients break what APGD does not; does everything fall at a large radius?

In go a function, at most 64 images with labels, and a threat model. Out come
`checks.Check`s, one for each question: its verdict (`pass`, `info`, `warn` or
`fail`), a line on what was seen, and the images that it is about. They need
attacks of their own and take minutes: an evaluation by itself makes only the
cheap checks of `checks`, and who wants a diagnosis calls for it. It returns the
cheap ones too, before its own.

Each question's docstring says when it speaks up; its numbers are thresholds.
What the attacks find is kept in `trials.Trials`, since most are compared with
the same APGD. Sources: the checklist of Carlini et al. 2019, "On evaluating
adversarial robustness"; the flags of AutoAttack (Croce and Hein 2020); the
indicators of attack failure (Pintor et al. 2022).
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from roli_jax import evaluate, statistics
from roli_jax.evaluate import checks, classifier, inputs
from roli_jax.evaluate.checks import Check, judged
from roli_jax.evaluate.classifier import Classifier, Examples
from roli_jax.evaluate.trials import STEPS, Trials
from roli_jax.threat import ThreatModel
from roli_jax.types import PyTree


def run(
  logits_fn: Callable[..., Any],
  images: np.ndarray,
  labels: np.ndarray,
  threat: ThreatModel,
  *,
  params: PyTree = None,
  seed: int = 0,
  batch_size: int = 128,
  indices: np.ndarray | None = None,
  stochastic: bool = False,
) -> list[Check]:
  """All checks of a function under a threat model, on at most 64 images.

  Args:
    logits_fn: as `evaluate.run` takes it.
    images: [n, h, w, c], in the box; the first 64 are looked at.
    labels: [n], their classes.
    threat: the ball and the box, of one radius.
    params: the function's first argument; None: it has none.
    seed: decides the attacks' noise, an int >= 0.
    batch_size: images attacked at once, >= 1.
    indices: [n], who each image is; 0..n-1 by default.
    stochastic: whether the function takes a key.

  Raises:
    ValueError: as `evaluate.run` does.
  """
  images = np.asarray(images)
  shape = inputs.image_shape(images)
  function = classifier.make(
    logits_fn, params, shape, batch_size, stochastic=stochastic, seed=seed
  )
  return run_on(function, images, labels, threat, indices=indices)


def run_on(
  function: Classifier,
  images: np.ndarray,
  labels: np.ndarray,
  threat: ThreatModel,
  *,
  indices: np.ndarray | None = None,
) -> list[Check]:
  """`run`, of a function that is a classifier on the devices already."""
  indices = np.arange(len(images)) if indices is None else indices
  given = (images, labels, indices)
  examples = Examples(*(np.asarray(x)[: checks.MOST] for x in given))
  trials = Trials(function, examples, threat)
  return [*trials.usual.checks, *(question(trials) for question in _QUESTIONS)]


# The questions.


def _gradients(trials: Trials) -> Check:
  """Zero or not finite for more than 1% of images, at them or near them."""
  bad = np.zeros(len(trials.images), bool)
  share = 0.0
  for x in (trials.images, trials.random_points(0)):
    for loss in ("ce", "margin"):
      grads = trials.climbed(x, loss)[1].reshape(len(x), -1)
      bad |= ~np.isfinite(grads).all(1) | (grads == 0).all(1)
      share = max(share, float((grads == 0).mean()))
  finding = (
    f"{bad.sum()} of {len(bad)} images have a gradient that is 0 or not"
    f" finite; {100 * share:.0f}% of its values are 0"
  )
  return trials.check("gradients", "warn", finding, bad)


def _finite_differences(trials: Trials) -> Check:
  """Slopes along 16 random directions have a cosine below 0.9 with differences.

  For more than 10% of images: the gradient is not that of the function.
  """
  rng = np.random.default_rng(0)
  images = trials.images
  value, grads = trials.climbed(images, "margin")
  d = int(np.prod(images.shape[1:]))
  # Far enough for float32: a change of about a hundredth of the margin's scale.
  slope = np.abs(grads).reshape(len(grads), -1).sum(1).mean()
  h = 0.01 * max(np.abs(value).mean(), 1e-6) / max(slope, 1e-12)
  h = np.clip(h, 2e-3 / d**0.5, 0.02)
  measured, expected = [], []
  for _ in range(16):
    way = rng.choice([-1.0, 1.0], images.shape).astype(np.float32)
    ahead, _ = trials.climbed(images + h * way, "margin")
    behind, _ = trials.climbed(images - h * way, "margin")
    measured.append((ahead - behind) / (2 * h))
    expected.append((grads * way).reshape(len(grads), -1).sum(1))
  cosine = _cosine(np.stack(measured, 1), np.stack(expected, 1))
  bad = cosine < 0.9
  finding = f"cosine with finite differences {np.median(cosine):.3f} (median)"
  return trials.check("gradient_is_right", "fail", finding, bad, 0.1 * len(bad))


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Row by row; 1 where both are 0."""
  a, b = (x.reshape(len(x), -1) for x in (a, b))
  lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
  both_zero = (a == 0).all(1) & (b == 0).all(1)
  return np.where(both_zero, 1.0, (a * b).sum(1) / np.maximum(lengths, 1e-30))


def _smoothness(trials: Trials) -> Check:
  """The gradient turns within the ball: a median cosine below 0.02."""
  grads = trials.climbed(trials.images, "margin")[1]
  near = trials.climbed(trials.random_points(1), "margin")[1]
  median = np.median(_cosine(grads, near))
  finding = (
    "cosine of gradients at the image and at a random point of the ball:"
    f" {median:.2f} (median)"
  )
  concerned = trials.examples.indices if median < 0.02 else ()
  return judged("smooth", "warn", finding, concerned)


def _one_step(trials: Trials) -> Check:
  """FGSM breaks what APGD does not."""
  missed = trials.missed(trials.attacked("fgsm"))
  finding = f"{missed.sum()} images fall to FGSM, not to APGD"
  return trials.check("iterations_beat_one_step", "warn", finding, missed)


def _more_steps(trials: Trials) -> Check:
  """Twice the steps break more than 1% more."""
  more = 2 * STEPS
  missed = trials.missed(trials.attacked("apgd_ce", num_steps=more))
  finding = f"{more} steps break {missed.sum()} images more than {STEPS}"
  return trials.check("more_steps", "warn", finding, missed)


def _more_restarts(trials: Trials) -> Check:
  """Four more restarts break more than 1% more."""
  missed = trials.missed(
    trials.attacked("apgd_ce", num_steps=STEPS, num_restarts=5)
  )
  finding = f"4 more restarts break {missed.sum()} images more"
  return trials.check("more_restarts", "warn", finding, missed)


def _monotone(trials: Trials) -> Check:
  """Images are broken at a radius, not at a larger one."""
  flags = [
    trials.attacked("apgd_ce", ratio, num_steps=STEPS).robust
    for ratio in (0.0, 0.5, 1.0, 2.0)
  ]
  pairs = itertools.pairwise(flags)
  odd = np.any([~small & large for small, large in pairs], axis=0)
  rates = ", ".join(f"{100 * flag.mean():.0f}%" for flag in flags)
  finding = (
    f"robust at 0, 1/2, 1 and 2 eps: {rates}; {odd.sum()} images not nested"
  )
  return trials.check("monotone", "fail", finding, odd)


def _across_the_box(trials: Trials, share: float) -> evaluate.Result:
  """APGD at the radius that moves each value by a share of the box's side."""
  d = float(np.prod(trials.images.shape[1:]))
  values = {"linf": 1.0, "l2": d**0.5, "l1": d}[trials.threat.norm]
  radius = (trials.threat.high - trials.threat.low) * share * values
  ratio = float(radius / max(float(trials.threat.eps), 1e-12))
  return trials.attacked("apgd_ce", ratio, num_steps=STEPS)


def _large_radius(trials: Trials) -> Check:
  """Any image can be made grey, and still more stand than chance explains."""
  result = _across_the_box(trials, 0.5)
  stands, right = result.robust, int(result.clean.sum())
  finding = f"{stands.sum()} of {right} stand when all can be made grey"
  return trials.check("large_eps", "fail", finding, stands, max(1, right // 2))


def _unbounded(trials: Trials) -> Check:
  """More than 1% stand where any image of the box is allowed."""
  result = _across_the_box(trials, 1.0)
  finding = (
    f"{result.robust.sum()} of {result.clean.sum()} stand within all the box"
  )
  return trials.check("unbounded", "fail", finding, result.robust)


def _black_box(trials: Trials) -> Check:
  """Square breaks what APGD on three losses does not."""
  missed = trials.missed(trials.attacked("square", num_queries=500))
  for name in ("apgd_dlr", "apgd_t"):
    missed &= trials.attacked(name, num_steps=STEPS).robust
  finding = (
    f"{missed.sum()} images fall to 500 queries of Square, not to gradients"
  )
  return trials.check("white_beats_black", "warn", finding, missed)


def _random_noise(trials: Trials) -> Check:
  """One of 100 random points of a ball is broken where APGD finds none."""
  fell = np.zeros(len(trials.images), bool)
  for k in range(100):
    points = dataclasses.replace(
      trials.examples, images=trials.random_points(k)
    )
    right, *_ = trials.function.judge(points)
    fell |= ~right
  missed = fell & trials.usual.robust
  finding = (
    f"{(fell & trials.usual.clean).sum()} images fall to 100 random points,"
    f" {missed.sum()} of them not to APGD"
  )
  return trials.check("random_noise", "warn", finding, missed)


def _other_losses(trials: Trials) -> Check:
  """DLR or the margin breaks 5% more than CE, and more than one image."""
  dlr = trials.missed(trials.attacked("apgd_dlr", num_steps=STEPS))
  margin = trials.missed(
    trials.attacked("apgd_ce", num_steps=STEPS, loss="margin")
  )
  finding = (
    f"DLR breaks {dlr.sum()} and the margin {margin.sum()} images that CE"
    " misses"
  )
  most = dlr if dlr.sum() >= margin.sum() else margin
  allowed = max(1, 0.05 * len(most))
  return trials.check("losses_agree", "warn", finding, most, allowed)


def _silent_success(trials: Trials) -> Check:
  """For information: an image on the path was misclassified, the last not."""
  last, best = (
    trials.attacked("pgd", num_steps=20, keep=keep)
    for keep in ("last", "sample")
  )
  silent = last.robust & ~best.robust
  finding = f"{silent.sum()} paths of PGD passed a better image than their last"
  return trials.check("silent_success", "info", finding, silent, allowed=0)


def _outside(trials: Trials) -> Check:
  """An attack left the ball or the box."""
  each = [result.invalid for result in trials.results.values()]
  outside = np.any(each, axis=0)
  finding = f"{outside.sum()} images outside, of {len(each)} attacks"
  return trials.check("all_inside", "fail", finding, outside, allowed=0)


def _worst_case(trials: Trials) -> Check:
  """For information: who stands against all attacks at the radius."""
  each = [
    result.robust
    for (_, ratio, *_), result in trials.results.items()
    if ratio == 1.0
  ]
  stands = np.all(each, axis=0)
  low, high = statistics.wilson(int(stands.sum()), len(stands))
  finding = (
    f"{stands.sum()} of {len(stands)} stand against each of {len(each)}"
    f" attacks: {100 * stands.mean():.1f}%, 95% Wilson interval"
    f" [{100 * low:.1f}, {100 * high:.1f}]"
  )
  return Check("worst_case", "info", finding)


def _distances(trials: Trials) -> Check:
  """The median distance found is beyond that to an image of another class."""
  images, labels = trials.images, trials.examples.labels
  found = trials.attacked("fab_t", num_steps=STEPS).min_distance
  apart = np.full(len(images), np.inf)
  for i, image in enumerate(images):
    others = images[labels != labels[i]]
    if len(others):
      origin = np.broadcast_to(image, others.shape)
      apart[i] = float(np.min(trials.threat.distance(others, origin)))
  found = np.where(trials.usual.clean, found, 0)
  finding = (
    f"median distance found {np.median(found):.3g}, to the nearest image of"
    f" another class {np.median(apart):.3g}"
  )
  beyond = np.median(found) > np.median(apart)
  concerned = trials.examples.indices[found > apart] if beyond else ()
  return judged("distances", "fail", finding, concerned)


# In the order of the report: `_outside` and `_worst_case` speak of the attacks
# that those before them have made.
_QUESTIONS: Sequence[Callable[[Trials], Check]] = (
  _gradients,
  _finite_differences,
  _smoothness,
  _one_step,
  _more_steps,
  _more_restarts,
  _monotone,
  _large_radius,
  _unbounded,
  _black_box,
  _random_noise,
  _other_losses,
  _silent_success,
  _outside,
  _worst_case,
  _distances,
)
