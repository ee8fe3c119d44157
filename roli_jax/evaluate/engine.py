"""An evaluation: who attacks whom, what is judged, and what is kept of it."""

import dataclasses
import pathlib
import time
from typing import Any

import jax
import numpy as np

from roli_jax import attacks, keys, progress
from roli_jax.evaluate import batching, checks
from roli_jax.evaluate.ledger import Ledger
from roli_jax.evaluate.result import Result
from roli_jax.files import journal


class Evaluation:
  """An evaluation as far as it is."""

  def __init__(self, function, images, labels, indices, attack, save):
    self.function = function
    self.images, self.labels, self.indices = images, labels, indices
    n = len(images)
    self.clean, self.margin, self.logits = function.judge(
      images, labels, indices
    )
    checks.check_numbers(self.logits, indices)
    self.work = {"none": batching.Work(forward=n)}
    self.resumed: list[batching.Work] = []
    self.checks = checks.of_outputs(
      function, images, labels, indices, self.clean, self.logits
    )
    seen = slice(checks.MOST) if attack is None else self.clean
    found, self.slopes = checks.of_gradients(
      function, images[seen], labels[seen], indices[seen]
    )
    self.checks.append(found)
    self.notes: list[str] = []
    self.robust = self.clean.copy()
    self.broken_by = np.where(self.clean, "", "clean").astype(object)
    self.distance = np.where(self.clean, np.inf, 0.0)
    self.min_distance = self.distance.copy()
    self.adv = images.copy()
    self.invalid, self.strange = np.zeros(n, bool), np.zeros(n, bool)
    self.journal = self._journal(attack, save)

  def _journal(self, attack, save):
    """Progress as far as it is on disk; an error if it is of something else."""
    if not save:
      return journal.Journal(None, {}, {})
    path, params = pathlib.Path(save), jax.tree.leaves(self.function.params)
    about = {
      "attack": repr(attack),
      # A long array's repr leaves most of it out.
      "radii": journal.digest(*map(np.asarray, jax.tree.leaves(attack))),
      "seed": self.function.seed,
      "images": journal.digest(self.images, self.indices),
      "labels": journal.digest(self.labels.astype(np.int64)),
      "params": journal.digest(*params) if params else None,
      "stochastic": self.function.stochastic,
      "dtype": self.function.dtype,
    }
    older = {"clean predictions": journal.digest(self.clean)}
    kept = journal.Journal(path, about, older)
    entries = list(kept.entries("clean"))
    for entry in entries:
      self._check_model(path, entry)
    if not entries:
      # A journal of an older version: that an attack failed may have been
      # against another model. What it broke is judged again in any case.
      kept.filter(lambda entry: np.isfinite(entry["far"]))
      kept.add("clean", logits=self.logits, slopes=self.slopes)
    return kept

  def _check_model(self, path, entry):
    """Raises a ValueError unless logits and gradients are this model's.

    Compared as they are and not by a digest: another kind of CPU rounds
    otherwise, and may go on. A derivative that was mended leaves the logits.
    """
    off = checks.moved(entry["logits"], self.logits).max()
    ours, theirs = self.slopes, entry["slopes"]
    bent = np.inf
    if ours.shape == theirs.shape:
      most = np.maximum(np.maximum(ours, theirs), 1e-30)
      bent = np.median(np.abs(ours - theirs) / most) if len(ours) else 0.0
    for what, far, most in (("logits", off, 1e-3), ("gradients", bent, 0.05)):
      if not far <= most:
        raise ValueError(
          f"{path} holds progress of another evaluation: its clean {what}"
          f" differ by {far:.1e} of their length. Give another directory."
        )

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
    self.work["curve"] = sum(map(self.work.pop, names), batching.Work())

  def result(self, seconds: float) -> Result:
    """All that is known."""
    before = sum(work.seconds for work in self.resumed)
    found = checks.of_result(
      self.clean, self.broken_by, self.indices, self.invalid, self.strange
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
    self.strange[broken] = ledger.strange[broken]
    known = ~np.isnan(ledger.margin)
    self.margin[known] = ledger.margin[known]
    self.min_distance = np.minimum(self.min_distance, ledger.nearest)

  def _found(self, attack, name, rows, eps=None, towards=None, noise=None):
    """What an attack finds for these rows, as far as it is on disk from there.

    Args:
      attack: a search, or any attack of one call.
      name: what it is known by on disk.
      rows: which of the images are attacked, int [m].
      eps: a radius for each image in place of the attack's, [m].
      towards: [n, k], the targets, other than the clean logits' order.
      noise: [n, ...], what searches start from; None draws it.
    """
    num_classes = self.logits.shape[1]
    num_jobs = attack.jobs(num_classes) if attack.is_search else 1
    eps = self._radii(attack.threat) if eps is None else eps
    ledger = Ledger(self.images, num_jobs, attack.stop)
    for entry in self.journal.entries(name):
      ledger.enter(self._judged_again(attack, eps, entry))
      *passes, seconds = entry["work"].tolist()
      ledger.work = batching.Work(*map(int, passes), seconds)
    self.resumed.append(dataclasses.replace(ledger.work))
    started = time.perf_counter() - ledger.work.seconds

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

    if attack.is_search and towards is None:
      towards = self._targets(attack)
    waiting = [
      (int(row), job)
      for job in range(num_jobs)
      for row in rows[self._makes_sense(attack, towards, rows, job)]
      if not ledger.ended[row, job] and ledger.first[row] >= job
    ]
    if waiting:
      total = len(waiting) * (attack.length if attack.is_search else 1)
      with progress.bar(name, total) as update:

        def tell(advance):
          standing = int(self.robust.sum() - ledger.broken[rows].sum())
          update(advance, f"{standing} of {len(self.robust)} stand")

        if attack.is_search:
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

  def _targets(self, attack):
    """The classes aimed at: beside the label, largest clean logit first."""
    count = max(1, attack.targets(self.logits.shape[1]))
    others = self.logits.copy()
    others[np.arange(len(others)), self.labels] = -np.inf
    return np.argsort(-others, axis=1, kind="stable")[:, :count]

  def _makes_sense(self, attack, towards, rows, job):
    """Whether a job of these images can find anything."""
    if towards is None:
      return np.ones(len(rows), bool)
    target = min(job // attack.num_restarts, towards.shape[1] - 1)
    return attack.reachable(self.logits[rows], towards[rows, target])

  def _judged_again(self, attack, eps, entry):
    """An entry from disk, with what a pass of now says of its images.

    A job whose image is none any more is taken up again.
    """
    rows, claims = entry["rows"], np.isfinite(entry["far"])
    adv = self.images[rows].copy()
    adv[claims] = entry["adv"]
    ended = batching.Ended(rows, entry["jobs"], claims, adv, ~claims)
    now = self._judged(attack, eps, ended, batching.Work())
    now["margin"] = np.where(claims, now["margin"], entry["margin"])
    now["outside"] |= entry["outside"] & ~claims
    holds = np.isfinite(now["far"]) | ~claims
    return {**now, "ended": entry["ended"] & holds}

  def _search(self, attack, eps, towards, noise, waiting, settle, work, tell):
    subjects = batching.Subjects(
      self.images, self.labels, self.indices, eps, towards, noise
    )
    batching.run(self.function, attack, subjects, waiting, settle, work, tell)

  def _craft(self, attack, eps, rows, settle, work, tell):
    rows = np.array(rows)
    key = keys.stream(keys.root(self.function.seed), attack.name)
    arrays = (self.images, self.labels, self.indices, np.float32(eps))
    crafted = self.function.craft(attack, key, *(a[rows] for a in arrays))
    for part, adv, padding in crafted:
      work.add(len(adv), padding, attack.passes)
      yes = np.ones(len(adv), bool)
      settle(batching.Ended(rows[part], 0 * rows[part], yes, adv, ~yes))
      tell(len(adv))

  def _judged(self, attack, eps, ended, work):
    """What a fresh pass and float64 say of jobs that have ended."""
    claims, rows = ended.found, ended.rows
    count = len(rows)
    far, margin = np.full(count, np.inf), np.full(count, np.nan)
    outside, broke = np.zeros(count, bool), np.zeros(count, bool)
    said, strange = np.zeros(count, np.int64), np.zeros(count, bool)
    if claims.any():
      own = rows[claims]
      right, margins, logits = self.function.judge(
        ended.adv[claims], self.labels[own], self.indices[own]
      )
      work.forward += len(own)
      threat = dataclasses.replace(attack.threat, eps=eps[own])
      lengths, inside, in_box = threat.measure(
        ended.adv[claims], self.images[own]
      )
      # Beyond eps is no mistake of FAB's, and no break.
      allowed = in_box & (inside | attack.finds_distance)
      outside[claims] = ~allowed
      said[claims] = logits.argmax(1)
      masked = np.isneginf(self.logits[own])
      strange[claims] = ~(np.isfinite(logits) | masked).all(1)
      wrong = ~right & allowed
      far[claims] = np.where(wrong, lengths, np.inf)
      broke[claims] = wrong
      if attack.finds_distance:
        broke[claims] &= lengths <= eps[own]
      # A search's point is a verdict where it broke the image, not beyond eps.
      known = broke[claims] if attack.is_search else allowed
      margin[claims] = np.where(known, margins, np.nan)
    return {
      "rows": rows,
      "jobs": ended.jobs,
      "far": far,
      "broke": broke,
      "outside": outside,
      "margin": margin,
      "said": said,
      "strange": strange,
      "adv": ended.adv[np.isfinite(far)],
    }
