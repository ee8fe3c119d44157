"""Counts and intervals."""

import math

import numpy as np
import pytest

from roli_jax import metrics


def test_wilson_is_the_textbook_interval():
  low, high = metrics.wilson(8, 10)
  assert (low, high) == (pytest.approx(0.4902, abs=1e-4),
                         pytest.approx(0.9433, abs=1e-4))  # fmt: skip
  assert metrics.wilson(0, 10)[0] == 0
  assert metrics.wilson(10, 10)[1] == pytest.approx(1)
  assert metrics.wilson(0, 0) == (0.0, 1.0)


def test_wilson_covers_the_rate_it_estimates():
  rng = np.random.default_rng(0)
  covered = []
  for rate in rng.uniform(0.1, 0.9, 4000):
    low, high = metrics.wilson(int(rng.binomial(100, rate)), 100)
    covered.append(low <= rate <= high)
  assert abs(np.mean(covered) - 0.95) < 0.01


def test_t_interval_is_students():
  mean, low, high = metrics.t_interval([1.0, 2.0, 3.0])
  half = 4.302653 / math.sqrt(3)  # the quantile for two degrees of freedom
  assert mean == 2 and low == pytest.approx(2 - half, rel=1e-6)
  assert high == pytest.approx(2 + half, rel=1e-6)


def test_one_value_bounds_nothing():
  assert metrics.t_interval([0.5]) == (0.5, -math.inf, math.inf)


def test_expected_robustness_is_the_mean_under_the_curve():
  value = metrics.expected_robustness(
    [0, 1, 2, 3, 4], [0.8, 0.6, 0.4, 0.3, 0.2]
  )
  assert value == pytest.approx(0.45)
  assert metrics.expected_robustness([0, 0.1], [0.5, 0.5]) == pytest.approx(0.5)
  uneven = metrics.expected_robustness([0, 3, 4], [1.0, 1.0, 0.0])
  assert uneven == pytest.approx(3.5 / 4)


@pytest.mark.parametrize(
  "radii, accuracies",
  [([0.1, 0.2], [1, 1]), ([0, 0], [1, 1]), ([0], [1]), ([0, 1], [1])],
)
def test_a_curve_that_is_none_is_refused(radii, accuracies):
  with pytest.raises(ValueError, match="radii"):
    metrics.expected_robustness(radii, accuracies)
