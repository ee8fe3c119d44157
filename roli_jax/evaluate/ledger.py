"""What the jobs of an attack have found, whatever the order they ended in."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from roli_jax.evaluate import batching


class Ledger:
  """What an attack's jobs have found; NumPy arrays, n images of k jobs each.

  Of the jobs that broke an image the one of the lowest number counts, or the
  nearest where the attack looks for distances: never the one that happened to
  end first, which depends on what ran beside it.

  Attributes:
    stops: whether an image's later jobs are called off when it is broken.
    ended: which jobs have, bool [n, k].
    far: how far off a job found the image misclassified, else inf, [n, k].
    first: the job that counts; k where there is none, int [n].
    broken: whether a job broke the image, bool [n].
    adv: what that job found, or the nearest misclassified image, [n, ...].
    best: the distance of `adv` where one was found, else inf, [n].
    predicted: the class of `adv`, int [n].
    margin: its margin; NaN where nothing was judged, [n].
    outside: whether a job left the ball or the box, bool [n].
    strange: whether `adv` was judged by logits that are NaN or infinite, of
      classes that the clean image's don't mask, bool [n].
    work: what was computed.

  Args:
    images: the clean images, [n, ...].
    num_jobs: k, how many jobs an image has, >= 1.
    stops: see above.
  """

  def __init__(self, images: np.ndarray, num_jobs: int, stops: bool):
    n = len(images)
    self.stops = stops
    self.ended = np.zeros((n, num_jobs), bool)
    self.far = np.full((n, num_jobs), np.inf)
    self.first = np.full(n, num_jobs)
    self.broken = np.zeros(n, bool)
    self.adv = images.copy()
    self.predicted = np.zeros(n, np.int64)
    self.margin = np.full(n, np.nan)
    self.outside = np.zeros(n, bool)
    self.strange = np.zeros(n, bool)
    self.best = np.full(n, np.inf)
    self.work = batching.Work()

  @property
  def nearest(self) -> np.ndarray:
    """The least distance; not of jobs that were called off."""
    after = np.arange(self.far.shape[1]) > self.first[:, None]
    counts = np.where(after & self.stops, np.inf, self.far)
    return np.minimum(counts.min(1, initial=np.inf), self.best)

  def enter(self, entry: Mapping[str, Any]) -> None:
    """Enters jobs that have ended, as `Evaluation._judged` has judged them."""
    adv = iter(entry["adv"])  # has rows for those that were found, no others
    for i, (row, job) in enumerate(
      zip(entry["rows"], entry["jobs"], strict=True)
    ):
      far = entry["far"][i]
      self.ended[row, job] |= entry["ended"][i]
      self.far[row, job] = min(far, self.far[row, job])
      self.outside[row] |= entry["outside"][i]
      self.broken[row] |= entry["broke"][i]
      found = next(adv) if np.isfinite(far) else None
      if self.stops:
        wins = entry["broke"][i] and job < self.first[row]
      else:
        wins = (far, job) < (self.best[row], self.first[row])
      if wins and found is not None:
        self.first[row], self.best[row] = job, far
        self.adv[row], self.predicted[row] = found, entry["said"][i]
        self.strange[row] = entry["strange"][i]
      if wins or self.first[row] == self.far.shape[1]:
        self.margin[row] = entry["margin"][i]

  def take(self, other: "Ledger") -> None:
    """Takes over what another attack found nearer."""
    nearer = other.best < self.best
    for name in ("adv", "predicted", "margin", "best", "strange"):
      getattr(self, name)[nearer] = getattr(other, name)[nearer]
    self.outside |= other.outside
