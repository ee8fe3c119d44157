"""An evaluation: who attacks whom, what is judged, and what is kept of it."""

import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from roli_jax import attacks, keys, progress
from roli_jax.evaluate import batching, checks, inputs
from roli_jax.evaluate.batching import Ended, Subjects, Work
from roli_jax.evaluate.classifier import Classifier, Examples
from roli_jax.evaluate.ledger import Ledger
from roli_jax.evaluate.result import Result
from roli_jax.files import journal
from roli_jax.threat import ThreatModel


class Evaluation:
  """An evaluation in progress: which images still stand, after which attacks.

  Arrays are those that `Result` describes.

  Attributes:
    function: the function.
    examples: the clean images, float32, their labels, and who they are.
    logits: the clean images', [n, k].
    slopes: L1 norms of the gradients at clean images, see `_check_model`.
    strange: who was broken by logits that are NaN or infinite, bool [n].
    resumed: what attacks had computed in processes before this one.
    journal: progress on disk.

  Args:
    function: the function.
    examples: float32 images, int32 labels, int64 indices.
    attack: the attack that will be run; None: none.
    save: the directory of the journal; None keeps nothing.
    checked: whether outputs and gradients at clean images are checked. A
      journal needs it: by them it knows the model.
  """

  def __init__(
    self,
    function: Classifier,
    examples: Examples,
    attack: attacks.Attack | None,
    save: str | os.PathLike[str] | None,
    checked: bool = True,
  ):
    assert checked or not save
    self.function, self.examples = function, examples
    n = len(examples)
    self.clean, self.margin, self.logits = function.judge(examples)
    inputs.check_numbers(self.logits, examples.indices)
    self.work = {"none": Work(forward=n)}
    self.resumed: list[Work] = []
    self.checks: list[checks.Check] = []
    if checked:
      self.checks += checks.of_outputs(
        function, examples, self.clean, self.logits
      )
      seen = slice(checks.MOST) if attack is None else self.clean
      found, self.slopes = checks.of_gradients(function, examples[seen])
      self.checks.append(found)
    self.notes: list[str] = []
    self.robust = self.clean.copy()
    self.broken_by = np.where(self.clean, "", "clean").astype(object)
    self.distance = np.where(self.clean, np.inf, 0.0)
    self.min_distance = self.distance.copy()
    self.adv = examples.images.copy()
    self.tried: np.ndarray | None = None
    self.invalid, self.strange = np.zeros(n, bool), np.zeros(n, bool)
    self.journal = self._opened(attack, pathlib.Path(save) if save else None)

  def _opened(
    self, attack: attacks.Attack | None, path: pathlib.Path | None
  ) -> journal.Journal:
    """Progress as far as it is on disk; an error if it is of something else."""
    if path is None:
      return journal.Journal(None, {}, {})
    examples, params = self.examples, jax.tree.leaves(self.function.params)
    about = {
      "attack": repr(attack),
      # A long array's repr leaves most of it out.
      "radii": journal.digest(*map(np.asarray, jax.tree.leaves(attack))),
      "seed": self.function.seed,
      "targeted": self.function.targeted,
      "images": journal.digest(examples.images, examples.indices),
      "labels": journal.digest(examples.labels.astype(np.int64)),
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

  def _check_model(self, path: pathlib.Path, entry: Mapping[str, Any]) -> None:
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

  def attack(self, attack: attacks.Attack) -> None:
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
        name, rows = f"curve {k} {part.name}", np.flatnonzero(still)
        noise = best.adv - self.examples.images
        tried = self._found(
          part, name, rows, radius, best.predicted[:, None], noise
        )
        still &= ~tried.broken
        best.take(tried)
        step[tried.broken] *= 2
      low = np.where(still, radius, low)
    self._enter(best, attack.name, best.nearest <= self._radii(attack.threat))
    names = [name for name in self.work if name.startswith("curve ")]
    self.work["curve"] = sum(map(self.work.pop, names), Work())

  def result(self, seconds: float) -> Result:
    """All that is known, after so many seconds of this process."""
    before = sum(work.seconds for work in self.resumed)
    found = checks.of_result(
      self.clean,
      self.broken_by,
      self.examples.indices,
      self.invalid,
      self.strange,
    )
    return Result(
      clean=self.clean,
      robust=self.robust,
      broken_by=self.broken_by.astype(str),
      distance=self.distance,
      min_distance=self.min_distance,
      margin=self.margin,
      adv=self.adv,
      tried=self.tried,
      invalid=self.invalid,
      work=self.work,
      notes=self.notes,
      checks=[*self.checks, *found],
      seconds=seconds + before,
      targeted=self.function.targeted,
    )

  def _radii(self, threat: ThreatModel) -> np.ndarray:
    """Each image's radius, float64 [n]."""
    eps = np.asarray(threat.eps, np.float64)
    return np.broadcast_to(eps, len(self.examples)).copy()

  def _enter(self, ledger: Ledger, name: str, broken: np.ndarray) -> None:
    """Enters what an attack found; what is outside is reported, no break.

    Args:
      ledger: what it found.
      name: that of the attack.
      broken: which images count as broken by it, bool [n].
    """
    self.robust[broken] = False
    self.adv[broken] = ledger.adv[broken]
    self.distance[broken] = ledger.best[broken]
    self.broken_by[broken] = name
    self.invalid |= ledger.outside
    self.strange[broken] = ledger.strange[broken]
    known = ~np.isnan(ledger.margin)
    self.margin[known] = ledger.margin[known]
    self.min_distance = np.minimum(self.min_distance, ledger.nearest)

  def _found(
    self,
    attack: attacks.Attack,
    name: str,
    rows: np.ndarray,
    eps: np.ndarray | None = None,
    towards: np.ndarray | None = None,
    noise: np.ndarray | None = None,
  ) -> Ledger:
    """Runs an attack on these rows, from where its progress on disk ends.

    Args:
      attack: a search, or any attack of one call.
      name: what it is known by on disk.
      rows: which of the images are attacked, int [m].
      eps: [n], a radius for each image in place of the attack's.
      towards: [n, k], the targets, other than the clean logits' order.
      noise: [n, ...], what searches start from; None draws it.
    """
    radii = self._radii(attack.threat) if eps is None else eps
    search, num_classes = _as_search(attack), self.logits.shape[1]
    num_jobs = search.jobs(num_classes) if search else 1
    ledger = self._restored(attack, name, radii, num_jobs)
    started = time.perf_counter() - ledger.work.seconds

    def settle(ended: Ended) -> tuple[np.ndarray, np.ndarray]:
      """Judges jobs, keeps and enters the verdicts: broken, and to go on."""
      verdicts = self._judged(attack, radii, ended, ledger.work)
      # Where the least distance is looked for, beyond eps is found too.
      holds = (
        verdicts["broke"] if ledger.stops else np.isfinite(verdicts["far"])
      )
      goes_on = ended.found & ~holds & ended.can_go_on
      ledger.work.seconds = time.perf_counter() - started
      work = dataclasses.astuple(ledger.work)
      entry = {**verdicts, "ended": ~goes_on, "work": work}
      self.journal.add(name, **entry)
      ledger.enter(entry)
      return verdicts["broke"], goes_on

    run: Callable[..., None]
    if search is None:
      jobs = [(row, 0) for row in rows.tolist()]
      run = functools.partial(self._craft, attack, radii)
    else:
      towards = self._targets(search) if towards is None else towards
      subjects = Subjects(self.examples, radii, towards, noise)
      jobs = self._jobs(search, towards, rows)
      run = functools.partial(batching.run, self.function, search, subjects)
    waiting = [
      (row, job)
      for row, job in jobs
      if not ledger.ended[row, job] and ledger.first[row] >= job
    ]
    if waiting:
      total = len(waiting) * (search.length if search else 1)
      notes = search.notes(num_classes) if search else []
      self.notes += [note for note in notes if note not in self.notes]
      with progress.bar(name, total) as update:

        def tell(advance: int) -> None:
          standing = int(self.robust.sum() - ledger.broken[rows].sum())
          update(advance, f"{standing} of {len(self.robust)} stand")

        run(waiting, settle, ledger.work, tell)
    ledger.work.seconds = time.perf_counter() - started
    self.work[name] = ledger.work
    return ledger

  def _restored(
    self, attack: attacks.Attack, name: str, radii: np.ndarray, num_jobs: int
  ) -> Ledger:
    """Returns the ledger of an attack's finished jobs, from the journal.

    Their images are judged afresh. A job whose image is no longer misclassified
    runs again.
    """
    ledger = Ledger(self.examples.images, num_jobs, attack.stop)
    for entry in self.journal.entries(name):
      rows, claims = entry["rows"], np.isfinite(entry["far"])
      adv = self.examples.images[rows]
      adv[claims] = entry["adv"]
      ended = Ended(rows, entry["jobs"], claims, adv, ~claims)
      now = self._judged(attack, radii, ended, Work())
      now["margin"] = np.where(claims, now["margin"], entry["margin"])
      now["outside"] |= entry["outside"] & ~claims
      holds = np.isfinite(now["far"]) | ~claims
      ledger.enter({**now, "ended": entry["ended"] & holds})
      *passes, seconds = entry["work"].tolist()
      ledger.work = dataclasses.replace(
        Work(*map(int, passes)), seconds=seconds
      )
    self.resumed.append(dataclasses.replace(ledger.work))
    return ledger

  def _targets(self, search: attacks.Search) -> np.ndarray:
    """[n, k], the classes aimed at: beside the label, largest logit first."""
    count = max(1, search.targets(self.logits.shape[1]))
    others = self.logits.copy()
    others[np.arange(len(others)), self.examples.labels] = -np.inf
    return np.argsort(-others, axis=1, kind="stable")[:, :count]

  def _jobs(
    self, search: attacks.Search, towards: np.ndarray, rows: np.ndarray
  ) -> list[tuple[int, int]]:
    """(row, job) of all jobs that can find anything, all first jobs first."""
    jobs = []
    for job in range(search.jobs(self.logits.shape[1])):
      target = min(job // search.num_restarts, towards.shape[1] - 1)
      sensible = search.reachable(self.logits[rows], towards[rows, target])
      jobs += [(row, job) for row in rows[sensible].tolist()]
    return jobs

  def _craft(
    self,
    attack: attacks.Attack,
    radii: np.ndarray,
    waiting: Sequence[tuple[int, int]],
    settle: batching.Settle,
    work: Work,
    update: progress.Update,
  ) -> None:
    """Runs an attack of one call, as `batching.run` runs a search."""
    rows = np.array([row for row, _ in waiting])
    key = keys.stream(keys.root(self.function.seed), attack.name)
    crafted = self.function.craft(
      attack, key, self.examples[rows], radii[rows].astype(np.float32)
    )
    if self.tried is None:
      self.tried = self.examples.images.copy()
    for part, adv, padding in crafted:
      self.tried[rows[part]] = adv
      work.add(len(adv), padding, attack.passes)
      yes = np.ones(len(adv), bool)
      settle(Ended(rows[part], 0 * rows[part], yes, adv, ~yes))
      update(len(adv))

  def _judged(
    self, attack: attacks.Attack, radii: np.ndarray, ended: Ended, work: Work
  ) -> dict[str, np.ndarray]:
    """The verdicts on jobs that have ended: a fresh pass, and float64.

    Args:
      attack: the attack.
      radii: each image's, [n].
      ended: the jobs, b of them.
      work: the judge's passes are added to it.

    Returns:
      An entry of the journal, arrays of one entry a job: `rows` and `jobs`;
      `far`, the distance at which the image is misclassified, else inf;
      `broke`; `outside`, the ball or the box; `margin`, NaN where there is no
      verdict; `said`, the class; `strange`, by logits that are no numbers; and
      `adv`, the images of those whose `far` is finite.
    """
    claims, rows = ended.found, ended.rows
    count = len(rows)
    far, margin = np.full(count, np.inf), np.full(count, np.nan)
    outside, broke = np.zeros(count, bool), np.zeros(count, bool)
    predicted, strange = np.zeros(count, np.int64), np.zeros(count, bool)
    if claims.any():
      clean, adv = self.examples[rows[claims]], ended.adv[claims]
      eps = radii[rows[claims]]
      right, margins, logits = self.function.judge(
        dataclasses.replace(clean, images=adv)
      )
      work.forward += len(adv)
      threat = dataclasses.replace(attack.threat, eps=eps)
      lengths, inside, in_box = threat.measure(adv, clean.images)
      # Beyond eps is no mistake of FAB's, and no break.
      allowed = in_box & (inside | attack.finds_distance)
      outside[claims] = ~allowed
      predicted[claims] = logits.argmax(1)
      masked = np.isneginf(self.logits[rows[claims]])
      strange[claims] = ~(np.isfinite(logits) | masked).all(1)
      wrong = ~right & allowed
      far[claims] = np.where(wrong, lengths, np.inf)
      broke[claims] = wrong
      if attack.finds_distance:
        broke[claims] &= lengths <= eps
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
      "said": predicted,
      "strange": strange,
      "adv": ended.adv[np.isfinite(far)],
    }


def _as_search(attack: attacks.Attack) -> attacks.Search | None:
  """The attack if it is run step by step; None if by one call."""
  if isinstance(attack, attacks.Search) and attack.is_search:
    return attack
  return None
