"""What became of each image of an evaluation."""

import dataclasses
from typing import Any

import numpy as np

from roli_jax import statistics
from roli_jax.evaluate import batching, checks


@dataclasses.dataclass(frozen=True)
class Result:
  """What became of each image; NumPy arrays, one entry an image.

  Of a targeted attack, whose labels are targets, read "is not at its target"
  for "is classified as labelled", and "at its target" for "misclassified".

  Attributes:
    clean: whether the clean image is classified as labelled, bool [n].
    robust: whether it is, and so are all images that the attacks found, bool
      [n].
    broken_by: "" where robust, "clean" where misclassified before any attack,
      else the name of the attack that broke it; text [n].
    distance: how far the adversarial image is from the clean one, in the norm
      of the threat model, where an attack broke it; 0 where the clean image is
      misclassified, inf where it is robust; float64 [n].
    min_distance: the least distance at which the image was found to be
      misclassified, inside eps or not: by FAB and the curve, which look for
      it; else as `distance`; [n].
    margin: the label's logit minus the best other at the last verified point,
      [n].
    adv: the adversarial image where an attack broke it, else the clean one,
      float32 [n, h, w, c].
    invalid: whether an attack left the ball or the box, which never counts as
      a break, bool [n].
    work: passes of single images and seconds, by attack; those of the checks,
      five passes of at most 64 images, are left out.
    notes: where an attack did other than its name says: for few classes.
    checks: tests of whether the accuracy can be trusted, see `checks.Check`.
    seconds: how long it took, in this process and in those before it.
    tried: where an attack of one call, such as PGD, ended in this process,
      whether it broke the image or not, float32 [n, h, w, c]; the clean image
      where none was run, None where all attacks were searches.
    targeted: whether the attack was.
  """

  clean: np.ndarray
  robust: np.ndarray
  broken_by: np.ndarray
  distance: np.ndarray
  min_distance: np.ndarray
  margin: np.ndarray
  adv: np.ndarray
  invalid: np.ndarray
  work: dict[str, batching.Work]
  notes: list[str]
  checks: list[checks.Check]
  seconds: float
  tried: np.ndarray | None = None
  targeted: bool = False

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
    """Totals as plain values; rates come with 95% Wilson intervals.

    Of a targeted attack `reached` has the rates of images that are at their
    target: clean, and after the attack.
    """

    def rate(flags: np.ndarray) -> dict[str, float]:
      low, high = statistics.wilson(int(flags.sum()), len(flags))
      return {"value": float(flags.mean()), "low": low, "high": high}

    reached = {"clean": rate(~self.clean), "attacked": rate(~self.robust)}
    names, counts = np.unique(self.broken_by, return_counts=True)
    return {
      "n": len(self.clean),
      "clean": rate(self.clean),
      "robust": rate(self.robust),
      **({"reached": reached} if self.targeted else {}),
      "broken_by": dict(zip(names.tolist(), counts.tolist(), strict=True)),
      "passes": self.passes,
      "seconds": self.seconds,
      "attacks": {k: dataclasses.asdict(v) for k, v in self.work.items()},
      "notes": self.notes,
      "checks": {c.name: c.plain() for c in self.checks},
    }
