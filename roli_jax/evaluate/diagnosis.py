"""Would a sceptic believe it? Attacks that look for what attacks overlook.

Each question is asked of a few images and answered by a `checks.Check`; the
numbers in the docstrings are the thresholds. Sources: the checklist of Carlini
et al. 2019, "On evaluating adversarial robustness"; the flags of AutoAttack
(Croce and Hein 2020); the indicators of attack failure (Pintor et al. 2022).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from roli_jax import attacks, evaluate, keys, losses, statistics
from roli_jax.evaluate import checks, classifier
from roli_jax.evaluate.checks import MOST, Check, judged
from roli_jax.threat import ThreatModel

STEPS = 50  # of the attacks that ask
SHARE = 0.01  # of images that may behave oddly, but one always may


def run(
  logits_fn: Callable[..., Any],
  images: np.ndarray,
  labels: np.ndarray,
  threat: ThreatModel,
  *,
  params: Any = None,
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
    batch_size: images attacked at once.
    indices: who each image is.
    stochastic: whether the function takes a key.

  Raises:
    ValueError: as `evaluate.run` does.
  """
  images = np.asarray(images)
  checks.check_shape(images)
  function = classifier.make(
    logits_fn, params, images.shape[1:], batch_size, stochastic=stochastic,
    seed=seed,
  )  # fmt: skip
  return run_on(function, images, labels, threat, indices=indices)


def run_on(
  function: classifier.Classifier,
  images: np.ndarray,
  labels: np.ndarray,
  threat: ThreatModel,
  *,
  indices: np.ndarray | None = None,
) -> list[Check]:
  """`run`, of a function that is a classifier on the devices already."""
  indices = np.arange(len(images)) if indices is None else np.asarray(indices)
  images, labels, indices = (
    np.asarray(x)[:MOST] for x in (images, labels, indices)
  )
  attack = functools.partial(
    evaluate.run_on, function, images, labels, indices=indices
  )
  model = _Model(function, images.astype(np.float32), labels, indices, threat)
  tried = _Tried(attack, threat)
  return [
    *tried.climb.checks,
    _gradients(model),
    _finite_differences(model),
    _smoothness(model),
    _one_step(tried, indices),
    _more_steps(tried, indices),
    _more_restarts(tried, indices),
    _monotone(tried, indices),
    _large_radius(tried, indices),
    _unbounded(tried, indices),
    _black_box(tried, indices),
    _random_noise(tried, model),
    _other_losses(tried, indices),
    _silent_success(tried, indices),
    _outside(tried, indices),
    _worst_case(tried, indices),
    _distances(tried, model),
  ]


@dataclasses.dataclass(frozen=True)
class _Model:
  """The function and a few images, for questions that need no attack."""

  function: classifier.Classifier
  images: np.ndarray
  labels: np.ndarray
  indices: np.ndarray
  threat: ThreatModel

  def climbs(self, x: np.ndarray, loss: str) -> tuple[np.ndarray, np.ndarray]:
    """The values of a loss that attacks climb, and its gradients."""
    image_keys = keys.per_image(keys.root(self.function.seed), self.indices)
    climb = self.function.programs.compiled(_climb, static_argnums=0)
    value, grads = climb(loss, self.function.params, x, self.labels, image_keys)
    return np.asarray(value, np.float64), np.asarray(grads, np.float64)

  def somewhere(self, k: int) -> np.ndarray:
    """A random point of the ball around each image, the k-th."""
    key = keys.stream(keys.root(self.function.seed), "somewhere", k)
    image_keys = keys.per_image(key, self.indices)
    return np.asarray(self.threat.sample(image_keys, self.images))


def _climb(fn, loss, params, images, labels, image_keys):
  def values(x):
    with jax.default_matmul_precision("highest"):
      logits = fn(params, x, image_keys)
    value = losses.SURROGATES[loss].climb(logits, labels)
    return value.sum(), value

  grads, value = jax.grad(values, has_aux=True)(images)
  return value, grads


class _Tried:
  """Results of attacks, each made when it is first asked for."""

  def __init__(self, attack, threat):
    self.attack, self.threat = attack, threat
    self._results: dict[Any, evaluate.Result] = {}

  def __call__(self, name: str, ratio: float = 1.0, **fields) -> Any:
    """The result of an attack, at a ratio of the radius."""
    asked = (name, ratio, *sorted(fields.items()))
    if asked not in self._results:
      threat = dataclasses.replace(
        self.threat, eps=float(self.threat.eps) * ratio
      )
      made = attacks.build(name, threat, **fields)
      self._results[asked] = self.attack(made)
    return self._results[asked]

  @property
  def climb(self) -> evaluate.Result:
    """The settings of the attack that others are compared with: APGD on CE."""
    return self("apgd_ce", num_steps=STEPS)

  @property
  def all(self) -> list[evaluate.Result]:
    return list(self._results.values())


def _odd(found: np.ndarray, among: int) -> bool:
  """Whether these are more than chance allows: one, and 1%."""
  return bool(found.sum() > max(1, SHARE * among))


def _compared(name, verdict, said, found, among, indices):
  """A check that speaks up if too many images are concerned."""
  odd = _odd(found, among)
  return judged(name, verdict, said, indices[found] if odd else ())


def _gradients(model):
  """Zero or not finite for more than 1% of images, at them or near them."""
  bad = np.zeros(len(model.images), bool)
  share = 0.0
  for x in (model.images, model.somewhere(0)):
    for loss in ("ce", "margin"):
      grads = model.climbs(x, loss)[1].reshape(len(x), -1)
      bad |= ~np.isfinite(grads).all(1) | (grads == 0).all(1)
      share = max(share, float((grads == 0).mean()))
  return _compared(
    "gradients", "warn",
    f"{bad.sum()} of {len(bad)} images have a gradient that is 0 or not"
    f" finite; {100 * share:.0f}% of its values are 0",
    bad, len(bad), model.indices,
  )  # fmt: skip


def _finite_differences(model):
  """Slopes along 16 random directions have a cosine of 0.9 with differences."""
  rng = np.random.default_rng(0)
  value, grads = model.climbs(model.images, "margin")
  d = int(np.prod(model.images.shape[1:]))
  # Far enough for float32: a change of about a hundredth of the margin's scale.
  slope = np.abs(grads).reshape(len(grads), -1).sum(1).mean()
  h = np.clip(0.01 * max(np.abs(value).mean(), 1e-6) / max(slope, 1e-12),
              2e-3 / d**0.5, 0.02)  # fmt: skip
  seen, told = [], []
  for _ in range(16):
    way = rng.choice([-1.0, 1.0], model.images.shape).astype(np.float32)
    ahead, _ = model.climbs(model.images + h * way, "margin")
    behind, _ = model.climbs(model.images - h * way, "margin")
    seen.append((ahead - behind) / (2 * h))
    told.append((grads * way).reshape(len(grads), -1).sum(1))
  cosine = _cosine(np.stack(seen, 1), np.stack(told, 1))
  bad = cosine < 0.9
  return judged(
    "gradient_is_right", "fail",
    f"cosine with finite differences {np.median(cosine):.3f} (median)",
    model.indices[bad] if bad.mean() > 0.1 else (),
  )  # fmt: skip


def _cosine(a, b):
  a, b = (x.reshape(len(x), -1) for x in (a, b))
  lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
  both_zero = (a == 0).all(1) & (b == 0).all(1)
  return np.where(both_zero, 1.0, (a * b).sum(1) / np.maximum(lengths, 1e-30))


def _smoothness(model):
  """The gradient at a random point of the ball: median cosine above 0.02."""
  grads = model.climbs(model.images, "margin")[1]
  near = model.climbs(model.somewhere(1), "margin")[1]
  cosine = _cosine(grads, near)
  rough = np.median(cosine) < 0.02
  return judged(
    "smooth", "warn",
    "cosine of gradients at the image and at a random point of the ball:"
    f" {np.median(cosine):.2f} (median)",
    model.indices if rough else (),
  )  # fmt: skip


def _broken(result):
  return result.clean & ~result.robust


def _one_step(tried, indices):
  """FGSM breaks what APGD does not."""
  missed = _broken(tried("fgsm")) & tried.climb.robust
  return _compared(
    "iterations_beat_one_step", "warn",
    f"{missed.sum()} images fall to FGSM, not to APGD",
    missed, len(missed), indices,
  )  # fmt: skip


def _more_steps(tried, indices):
  """Twice the steps break more than 1% more."""
  more = tried("apgd_ce", num_steps=2 * STEPS)
  gained = tried.climb.robust & ~more.robust
  return _compared(
    "more_steps", "warn",
    f"{2 * STEPS} steps break {gained.sum()} images more than {STEPS}",
    gained, len(gained), indices,
  )  # fmt: skip


def _more_restarts(tried, indices):
  """Four more restarts break more than 1% more."""
  more = tried("apgd_ce", num_steps=STEPS, num_restarts=5)
  gained = tried.climb.robust & ~more.robust
  return _compared(
    "more_restarts", "warn",
    f"4 more restarts break {gained.sum()} images more",
    gained, len(gained), indices,
  )  # fmt: skip


def _monotone(tried, indices):
  """Broken at a radius, not at a larger one."""
  ratios = (0.0, 0.5, 1.0, 2.0)
  flags = [tried("apgd_ce", r, num_steps=STEPS).robust for r in ratios]
  pairs = itertools.pairwise(flags)
  odd = np.any([~small & large for small, large in pairs], axis=0)
  said = ", ".join(f"{100 * flag.mean():.0f}%" for flag in flags)
  return _compared(
    "monotone", "fail",
    f"robust at 0, 1/2, 1 and 2 eps: {said}; {odd.sum()} images not nested",
    odd, len(odd), indices,
  )  # fmt: skip


def _ratio_of_box(tried, images_shape, share):
  """The radius of a share of the box's side in each value, over eps."""
  d = int(np.prod(images_shape))
  norm = tried.threat.norm
  side = (tried.threat.high - tried.threat.low) * share
  radius = side * {"linf": 1.0, "l2": d**0.5, "l1": float(d)}[norm]
  return radius / max(float(tried.threat.eps), 1e-12)


def _at_share_of_box(tried, share):
  shape = tried.climb.adv.shape[1:]
  return tried("apgd_ce", _ratio_of_box(tried, shape, share), num_steps=STEPS)


def _large_radius(tried, indices):
  """Any image can be made grey: more than chance stands."""
  result = _at_share_of_box(tried, 0.5)
  chance = max(1, int(result.clean.sum()) // 2)
  stands = result.robust
  return judged(
    "large_eps", "fail",
    f"{stands.sum()} of {result.clean.sum()} stand when all can be made grey",
    indices[stands] if stands.sum() > chance else (),
  )  # fmt: skip


def _unbounded(tried, indices):
  """Within the whole box anything falls, but 1%."""
  result = _at_share_of_box(tried, 1.0)
  return _compared(
    "unbounded", "fail",
    f"{result.robust.sum()} of {result.clean.sum()} stand within all the box",
    result.robust, len(indices), indices,
  )  # fmt: skip


def _black_box(tried, indices):
  """Square breaks what APGD on three losses does not."""
  square = tried("square", num_queries=500)
  missed = _broken(square) & tried.climb.robust
  for name in ("apgd_dlr", "apgd_t"):
    missed &= tried(name, num_steps=STEPS).robust
  return _compared(
    "white_beats_black", "warn",
    f"{missed.sum()} images fall to 500 queries of Square, not to gradients",
    missed, len(missed), indices,
  )  # fmt: skip


def _random_noise(tried, model):
  """One of 100 random points of a ball is broken where APGD finds none."""
  fell = np.zeros(len(model.images), bool)
  for k in range(100):
    right, *_ = model.function.judge(
      model.somewhere(k), model.labels, model.indices
    )
    fell |= ~right
  missed = fell & tried.climb.robust
  return _compared(
    "random_noise", "warn",
    f"{(fell & tried.climb.clean).sum()} images fall to 100 random points,"
    f" {missed.sum()} of them not to APGD",
    missed, len(missed), model.indices,
  )  # fmt: skip


def _other_losses(tried, indices):
  """DLR or the margin breaks 5% more than CE, and more than one image."""
  others = [
    tried("apgd_dlr", num_steps=STEPS),
    tried("apgd_ce", num_steps=STEPS, loss="margin"),
  ]
  missed = [tried.climb.robust & ~other.robust for other in others]
  counts = [int(found.sum()) for found in missed]
  most = missed[int(np.argmax(counts))]
  many = max(counts) > max(1, 0.05 * len(indices))
  return judged(
    "losses_agree", "warn",
    f"DLR breaks {counts[0]} and the margin {counts[1]} images that CE misses",
    indices[most] if many else (),
  )  # fmt: skip


def _silent_success(tried, indices):
  """For information: an image on the path was misclassified, the last not."""
  last = tried("pgd", num_steps=20, keep="last")
  best = tried("pgd", num_steps=20, keep="sample")
  silent = last.robust & ~best.robust
  return Check(
    "silent_success", "info" if silent.any() else "pass",
    f"{silent.sum()} paths of PGD passed a better image than their last",
    tuple(indices[silent].tolist()),
  )  # fmt: skip


def _outside(tried, indices):
  """An attack left the ball or the box."""
  outside = np.any([result.invalid for result in tried.all], axis=0)
  return judged(
    "all_inside", "fail",
    f"{outside.sum()} images outside, of {len(tried.all)} attacks",
    indices[outside],
  )  # fmt: skip


def _worst_case(tried, indices):
  """For information: who stands against all attacks at the radius."""
  at_eps = [
    result for asked, result in tried._results.items() if asked[1] == 1.0
  ]
  stands = np.all([result.robust for result in at_eps], axis=0)
  low, high = statistics.wilson(int(stands.sum()), len(stands))
  return Check(
    "worst_case", "info",
    f"{stands.sum()} of {len(stands)} stand against each of {len(at_eps)}"
    f" attacks: {100 * stands.mean():.1f}%, 95% Wilson interval"
    f" [{100 * low:.1f}, {100 * high:.1f}]",
  )  # fmt: skip


def _distances(tried, model):
  """The median distance found is beyond that to an image of another class."""
  found = tried("fab_t", num_steps=STEPS).min_distance
  apart = np.full(len(model.images), np.inf)
  for i, image in enumerate(model.images):
    others = model.images[model.labels != model.labels[i]]
    if len(others):
      origin = np.broadcast_to(image, others.shape)
      apart[i] = float(np.min(model.threat.distance(others, origin)))
  found = np.where(tried.climb.clean, found, 0)
  beyond = np.median(found) > np.median(apart)
  return judged(
    "distances", "fail",
    f"median distance found {np.median(found):.3g}, to the nearest image of"
    f" another class {np.median(apart):.3g}",
    model.indices[found > apart] if beyond else (),
  )  # fmt: skip
