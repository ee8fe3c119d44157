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

  # Each float32 or int32 [] inside a step, a NumPy scalar on the host.
  loss: Any
  correct: Any
  seen: Any


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
  """Returns the Wilson score interval of a rate (Wilson 1927).

  Args:
    successes: from 0 to n.
    n: the number of trials, >= 0; 0 gives [0, 1].
    z: the normal quantile; the default gives 95%.
  """
  if n == 0:
    return 0.0, 1.0
  rate, z2 = successes / n, z * z
  middle = (rate + z2 / (2 * n)) / (1 + z2 / n)
  half = z / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
  return max(0.0, middle - half), min(1.0, middle + half)


def t_interval(
  values: Sequence[float], level: float = 0.95
) -> tuple[float, float, float]:
  """Returns the mean, and the two ends of Student's interval for it.

  For fewer than two values the interval is unbounded.

  Args:
    values: a sample of at least one.
    level: the probability that the interval covers the mean, in (0, 1).
  """
  from scipy import stats

  mean = float(np.mean(values))
  if len(values) < 2:
    return mean, -math.inf, math.inf
  error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
  half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
  return mean, mean - half, mean + half


def t_test(values: Sequence[float]) -> float:
  """Returns the two-sided p value of Student's t test that the mean is 0.

  Equal values have p value 1: where a few agree, their spread of 0 is no
  estimate, and dividing by it would make any mean certain. NaN for fewer than
  two values, and where one is not finite.
  """
  from scipy import stats

  if len(values) < 2 or not np.isfinite(values).all():
    return math.nan
  if np.ptp(values) == 0:
    return 1.0
  return float(stats.ttest_1samp(values, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
  """Corrects p values for their number (Holm 1979), each in its place.

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
  """Returns the mean accuracy over radii from 0 to the largest, by trapezia.

  Epsilon-Scheduling's summary of a curve (2509.23325): what an attacker of a
  radius unknown, uniform in [0, eps], leaves.

  Args:
    radii: increasing, the first 0 (clean), the last eps.
    accuracies: the accuracy at each radius, in [0, 1].

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
