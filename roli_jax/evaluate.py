"""Robust accuracy of any function, image by image.

An attack never judges itself: what it claims is classified by a fresh forward
pass at highest precision, and its distance is measured in float64 on the host.
Each image's result depends on that image, the attack and the seed, not on
which images it shares a batch with, nor on interruptions.
"""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from roli_jax import (
  attacks,
  checks,
  classifier,
  journal,
  keys,
  metrics,
  pool,
  progress,
)
from roli_jax.attacks import search
from roli_jax.ledger import Ledger


@dataclasses.dataclass(frozen=True)
class Result:
  """What became of each image; NumPy arrays, one entry an image.

  Attributes:
    clean: whether the clean image is classified as labelled.
    robust: whether it is, and so are all images that the attacks found.
    broken_by: "" where robust, "clean" where misclassified before any attack,
      else the name of the attack that broke it.
    distance: of the adversarial image where an attack broke it; 0 where the
      clean image is misclassified, inf where it is robust.
    min_distance: the least distance at which the image was found to be
      misclassified, inside eps or not: by FAB and the curve, which look for
      it; else as `distance`.
    margin: the label's logit minus the best other at the last verified point.
    adv: the adversarial image where an attack broke it, else the clean one.
    invalid: whether an attack left the ball or the box, which never counts as
      a break.
    work: passes of single images and seconds, by attack; those of the checks,
      five passes of at most 64 images, are left out.
    notes: where an attack did other than its name says: for few classes.
    checks: what was found to be right or wrong with the function.
    seconds: of it all, in this process and in those that were interrupted.
  """

  clean: np.ndarray
  robust: np.ndarray
  broken_by: np.ndarray
  distance: np.ndarray
  min_distance: np.ndarray
  margin: np.ndarray
  adv: np.ndarray
  invalid: np.ndarray
  work: dict[str, pool.Work]
  notes: list[str]
  checks: list[checks.Check]
  seconds: float

  @property
  def passes(self) -> dict[str, int]:
    """Forward and backward passes of single images, padding left out."""
    works = self.work.values()
    return {
      "forward": sum(work.forward for work in works),
      "backward": sum(work.backward for work in works),
    }

  def robust_at(self, eps: float) -> np.ndarray:
    """Who is right, and was found misclassified at no distance up to eps.

    An upper bound on robust accuracy at each radius; after the attack `curve`
    a sharp one. Never more images at a larger radius.
    """
    return self.clean & (self.min_distance > eps)

  def summary(self) -> dict[str, Any]:
    """Totals as plain values; rates come with 95% Wilson intervals."""

    def rate(flags):
      low, high = metrics.wilson(int(flags.sum()), len(flags))
      return {"value": float(flags.mean()), "low": low, "high": high}

    names, counts = np.unique(self.broken_by, return_counts=True)
    return {
      "n": len(self.clean),
      "clean": rate(self.clean),
      "robust": rate(self.robust),
      "broken_by": dict(zip(names.tolist(), counts.tolist(), strict=True)),
      "passes": self.passes,
      "seconds": self.seconds,
      "attacks": {k: dataclasses.asdict(v) for k, v in self.work.items()},
      "notes": self.notes,
      "checks": {c.name: c.plain() for c in self.checks},
    }


def run(
  logits_fn: Callable[..., Any],
  images: np.ndarray,
  labels: np.ndarray,
  attack: attacks.Attack | None,
  *,
  params: Any = None,
  seed: int = 0,
  batch_size: int = 128,
  indices: np.ndarray | None = None,
  stochastic: bool = False,
  save: str | os.PathLike[str] | None = None,
  dtype: str | None = None,
) -> Result:
  """Attacks each image that is classified as labelled, and judges the result.

  Of an ensemble such as AutoAttack each attack sees what those before it left.
  Jobs (an image, with a target or a restart) are packed into few fixed sizes
  of batches; who falls leaves at once.

  Args:
    logits_fn: `(images) -> logits`, or `(params, images) -> logits` if params
      are given; then other params of the same shapes compile nothing. With
      `stochastic` it takes a key last.
    images: [n, h, w, c], floats in the box of the threat model.
    labels: [n], integers within the logits' width.
    attack: None measures clean accuracy alone.
    params: of `logits_fn`, a tree of arrays.
    seed: of the attacks' noise.
    batch_size: images attacked at once.
    indices: who each image is, 0..n-1 by default; keys are folded from (seed,
      index, attack, job) and from nothing else.
    stochastic: whether the function draws from a key. Each image is then seen
      alone, with a key of its own, and judged by the majority of 20 draws.
    save: a directory that progress goes to after each bucket of work. The same
      call with the same directory goes on where it stopped.
    dtype: `bfloat16` for the attacks' passes, to which images and params are
      cast; claims are still judged as they are. None casts nothing.

  Raises:
    ValueError: images, labels or indices that can't be meant; a function whose
      outputs are no logits; progress of another evaluation.
  """
  started = time.perf_counter()
  images, labels = np.asarray(images), np.asarray(labels)
  indices = np.arange(len(images)) if indices is None else np.asarray(indices)
  on = classifier.make(
    logits_fn, params, batch_size,
    stochastic=stochastic, dtype=dtype, seed=seed,
  )  # fmt: skip
  checks.check_inputs(on, images, labels, indices, attack)
  now = _Evaluation(on, images.astype(np.float32), labels, indices, attack,
                    save)  # fmt: skip
  if isinstance(attack, attacks.Curve):
    now.curve(attack)
  elif attack is not None:
    for part in getattr(attack, "parts", (attack,)):
      now.attack(part)
  return now.result(time.perf_counter() - started)


class _Evaluation:
  """An evaluation as far as it is."""

  def __init__(self, on, images, labels, indices, attack, save):
    self.on = on
    self.images, self.labels, self.indices = images, labels, indices
    n = len(images)
    self.clean, self.margin, self.logits = on.judge(images, labels, indices)
    checks.check_numbers(self.logits, indices)
    self.work = {"none": pool.Work(forward=n)}
    self.resumed: list[pool.Work] = []
    self.checks = checks.of_outputs(on, images, labels, indices, self.logits)
    self.notes: list[str] = []
    self.robust = self.clean.copy()
    self.broken_by = np.where(self.clean, "", "clean").astype(object)
    self.distance = np.where(self.clean, np.inf, 0.0)
    self.min_distance = self.distance.copy()
    self.adv = images.copy()
    self.invalid = np.zeros(n, bool)
    about = {
      "attack": repr(attack),
      "seed": on.seed,
      "images": journal.digest(images, indices),
      "labels": journal.digest(labels.astype(np.int64)),
      "clean predictions": journal.digest(self.clean),
      "stochastic": on.stochastic,
      "dtype": on.dtype,
    }
    self.journal = journal.Journal(save and pathlib.Path(save), about)

  def attack(self, attack: Any) -> None:
    """Attacks those that still stand, and enters what became of them."""
    ledger = self._found(attack, attack.name, np.flatnonzero(self.robust))
    self._enter(ledger, attack.name, ledger.broken)

  def curve(self, attack: attacks.Curve) -> None:
    """The least distance of each image, from which a whole curve follows.

    FAB finds one. APGD then tries smaller radii, each image its own: from the
    nearest image so far, shrunk to the radius, towards that image's class and
    away from the label. It goes down in doubling steps, and by halves as soon
    as a radius held.
    """
    alive = np.flatnonzero(self.clean)
    most = self._radii(attack.threat) * attack.reach
    best = self._found(attack.fab, "curve fab_t", alive, most)
    low = np.where(self.clean, 0.0, np.inf)
    step = attack.first_step * np.minimum(best.nearest, most)
    for k in range(attack.num_rounds):
      radius = np.maximum(best.nearest - step, (low + best.nearest) / 2)
      radius = np.minimum(radius, most).astype(np.float32)
      still = (low < 0.999 * best.nearest) & (low < most)
      for part in attack.climbs:
        rows = np.flatnonzero(still)
        tried = self._found(
          part, f"curve {k} {part.name}", rows, radius,
          towards=best.said[:, None], noise=best.adv - self.images,
        )  # fmt: skip
        still &= ~tried.broken
        best.take(tried)
        step[tried.broken] *= 2
      low = np.where(still, radius, low)
    self._enter(best, attack.name, best.nearest <= self._radii(attack.threat))
    names = [name for name in self.work if name.startswith("curve ")]
    self.work["curve"] = sum(map(self.work.pop, names), pool.Work())

  def result(self, seconds: float) -> Result:
    """All that is known."""
    before = sum(work.seconds for work in self.resumed)
    found = checks.of_result(
      self.clean, self.broken_by, self.indices, self.invalid
    )
    return Result(
      clean=self.clean,
      robust=self.robust,
      broken_by=self.broken_by.astype(str),
      distance=self.distance,
      min_distance=self.min_distance,
      margin=self.margin,
      adv=self.adv,
      invalid=self.invalid,
      work=self.work,
      notes=self.notes,
      checks=[*self.checks, *found],
      seconds=seconds + before,
    )

  def _radii(self, threat):
    """Each image's radius, in float64."""
    eps = np.asarray(threat.eps, np.float64)
    return np.broadcast_to(eps, len(self.images)).copy()

  def _enter(self, ledger, name, broken):
    """Enters what an attack found; what is outside is reported, no break."""
    self.robust[broken] = False
    self.adv[broken] = ledger.adv[broken]
    self.distance[broken] = ledger.best[broken]
    self.broken_by[broken] = name
    self.invalid |= ledger.outside
    known = ~np.isnan(ledger.margin)
    self.margin[known] = ledger.margin[known]
    self.min_distance = np.minimum(self.min_distance, ledger.nearest)

  def _found(self, attack, name, rows, eps=None, towards=None, noise=None):
    """What an attack finds for these rows, as far as it is on disk from there.

    Args:
      attack: a search, or any attack of one call.
      name: what it is known by on disk.
      rows: of the images that are attacked.
      eps: of each image, other than the attack's.
      towards: [n, k], the targets, other than the clean logits' order.
      noise: [n, ...], what searches start from; None draws it.
    """
    searches = isinstance(attack, search.Search)
    num_classes = self.logits.shape[1]
    num_jobs = attack.jobs(num_classes) if searches else 1
    ledger = Ledger(self.images, num_jobs, getattr(attack, "stop", True))
    for entry in self.journal.entries(name):
      ledger.enter(entry)
      *passes, seconds = entry["work"].tolist()
      ledger.work = pool.Work(*map(int, passes), seconds)
    self.resumed.append(dataclasses.replace(ledger.work))
    started = time.perf_counter() - ledger.work.seconds
    eps = self._radii(attack.threat) if eps is None else eps

    def settle(ended):
      told = self._judged(attack, eps, ended, ledger.work)
      false = ended.found & ~told["broke"]
      goes_on = false & ended.can_go_on & ledger.stops
      ledger.work.seconds = time.perf_counter() - started
      entry = {
        **told,
        "ended": ~goes_on,
        "work": dataclasses.astuple(ledger.work),
      }
      self.journal.add(name, **entry)
      ledger.enter(entry)
      return told["broke"], goes_on

    waiting = [
      (int(row), job)
      for job in range(num_jobs)
      for row in rows
      if not ledger.ended[row, job] and ledger.first[row] >= job
    ]
    if waiting:
      total = len(waiting) * (attack.length if searches else 1)
      with progress.bar(name, total) as update:

        def tell(advance):
          standing = int(self.robust.sum() - ledger.broken[rows].sum())
          update(advance, f"{standing} of {len(self.robust)} stand")

        if searches:
          self.notes += [
            note for note in attack.notes(num_classes) if note not in self.notes
          ]
          self._search(attack, eps, towards, noise, waiting, settle,
                       ledger.work, tell)  # fmt: skip
        else:
          self._craft(attack, eps, [row for row, _ in waiting], settle,
                      ledger.work, tell)  # fmt: skip
    ledger.work.seconds = time.perf_counter() - started
    self.work[name] = ledger.work
    return ledger

  def _search(self, attack, eps, towards, noise, waiting, settle, work, tell):
    if towards is None:
      count = max(1, attack.targets(self.logits.shape[1]))
      others = self.logits.copy()
      others[np.arange(len(others)), self.labels] = -np.inf
      towards = np.argsort(-others, axis=1, kind="stable")[:, :count]
    of = pool.Subjects(
      self.images, self.labels, self.indices, eps, towards, noise
    )
    pool.run(self.on, attack, of, waiting, settle, work, tell)

  def _craft(self, attack, eps, rows, settle, work, tell):
    rows = np.array(rows)
    key = keys.stream(keys.root(self.on.seed), attack.name)
    arrays = (self.images, self.labels, self.indices, np.float32(eps))
    crafted = self.on.craft(attack, key, *(a[rows] for a in arrays))
    for part, adv, padding in crafted:
      work.add(len(adv), padding, attack.passes)
      yes = np.ones(len(adv), bool)
      settle(pool.Ended(rows[part], 0 * rows[part], yes, adv, ~yes))
      tell(len(adv))

  def _judged(self, attack, eps, ended, work):
    """What a fresh pass and float64 say of jobs that have ended."""
    claims, rows = ended.found, ended.rows
    count = len(rows)
    far, margin = np.full(count, np.inf), np.full(count, np.nan)
    outside, broke = np.zeros(count, bool), np.zeros(count, bool)
    said = np.zeros(count, np.int64)
    if claims.any():
      own = rows[claims]
      right, margins, logits = self.on.judge(
        ended.adv[claims], self.labels[own], self.indices[own]
      )
      work.forward += len(own)
      threat = dataclasses.replace(attack.threat, eps=eps[own])
      lengths, inside, in_box = threat.measure(
        ended.adv[claims], self.images[own]
      )
      # Beyond eps is no mistake of FAB's, and no break.
      looks = np.full(len(own), isinstance(attack, attacks.Fab))
      allowed = in_box & (inside | looks)
      outside[claims] = ~allowed
      said[claims] = logits.argmax(1)
      wrong = ~right & allowed
      far[claims] = np.where(wrong, lengths, np.inf)
      broke[claims] = wrong & (~looks | (lengths <= eps[own]))
      # A search's point is a verdict where it broke the image, not beyond eps.
      counts = broke[claims] | (
        allowed & (not isinstance(attack, search.Search))
      )
      margin[claims] = np.where(counts, margins, np.nan)
    return {
      "rows": rows,
      "jobs": ended.jobs,
      "far": far,
      "broke": broke,
      "outside": outside,
      "margin": margin,
      "said": said,
      "adv": ended.adv[np.isfinite(far)],
    }
