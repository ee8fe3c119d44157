"""Counts that add up, and what can be said from them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from roli_jax import trees


@trees.tree_class
class Counts:
  """Sums over the images of a step; sums of sums are means of images.

  Attributes:
    loss: the objective, summed over the images.
    correct: images classified as labelled, as they were trained on.
    seen: images.
  """

  loss: Any  # numbers: arrays inside a step, plain on the host
  correct: Any
  seen: Any


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
  """The Wilson score interval of a rate; 95% by default (Wilson 1927)."""
  if n == 0:
    return 0.0, 1.0
  rate, z2 = successes / n, z * z
  middle = (rate + z2 / (2 * n)) / (1 + z2 / n)
  half = z / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
  return max(0.0, middle - half), min(1.0, middle + half)


def t_interval(
  values: Sequence[float], level: float = 0.95
) -> tuple[float, float, float]:
  """The mean, and Student's interval for it with len(values) - 1 degrees.

  Of fewer than two values the interval is unbounded.
  """
  from scipy import stats

  mean = float(np.mean(values))
  if len(values) < 2:
    return mean, -math.inf, math.inf
  error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
  half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
  return mean, mean - half, mean + half


def t_test(values: Sequence[float]) -> float:
  """The two-sided p value of Student's t test that the mean is 0.

  Equal values have p value 1: where a few agree, their spread of 0 is no
  estimate, and dividing by it would make any mean certain. Of fewer than two
  values, and of any that is not finite, it is NaN.
  """
  from scipy import stats

  if len(values) < 2 or not np.isfinite(values).all():
    return math.nan
  if np.ptp(values) == 0:
    return 1.0
  return float(stats.ttest_1samp(values, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
  """P values corrected for the number of them (Holm 1979), each in its place.

  Rejecting those below a level keeps the chance of any false rejection at or
  below that level, whatever their dependence. NaN is no test: it stays NaN and
  is not counted.
  """
  given = np.asarray(p_values, float)
  order = np.argsort(given)[: np.isfinite(given).sum()]  # NaN sorts last
  factors = np.arange(len(order), 0, -1)
  corrected = np.full(len(given), math.nan)
  corrected[order] = np.maximum.accumulate(factors * given[order]).clip(max=1)
  return corrected.tolist()


def expected_robustness(
  radii: Sequence[float | int], accuracies: Sequence[float | int]
) -> float:
  """The mean accuracy over the radii from 0 to the largest, by trapezia.

  Epsilon-Scheduling's summary of a curve (2509.23325): what an attacker of a
  radius unknown, uniform in [0, eps], leaves.

  Args:
    radii: increasing, the first 0 (clean), the last eps.
    accuracies: at each.

  Raises:
    ValueError: radii that do not increase from 0, or not as many accuracies.
  """
  gaps = np.diff(radii)
  if len(radii) < 2 or radii[0] != 0 or not (gaps > 0).all():
    raise ValueError(f"expected radii that increase from 0, got {radii}")
  if len(accuracies) != len(radii):
    raise ValueError(f"{len(radii)} radii, {len(accuracies)} accuracies")
  heights = np.asarray(accuracies)
  return float((gaps * (heights[1:] + heights[:-1]) / 2).sum() / radii[-1])
