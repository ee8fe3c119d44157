"""Counts and intervals."""

import math

import numpy as np
import pytest

from roli_jax import statistics


def test_wilson_is_the_textbook_interval():
  low, high = statistics.wilson(8, 10)
  assert (low, high) == (pytest.approx(0.4902, abs=1e-4),
                         pytest.approx(0.9433, abs=1e-4))  # fmt: skip
  assert statistics.wilson(0, 10)[0] == 0
  assert statistics.wilson(10, 10)[1] == pytest.approx(1)
  assert statistics.wilson(0, 0) == (0.0, 1.0)


def test_wilson_covers_the_rate_it_estimates():
  rng = np.random.default_rng(0)
  covered = []
  for rate in rng.uniform(0.1, 0.9, 4000):
    low, high = statistics.wilson(int(rng.binomial(100, rate)), 100)
    covered.append(low <= rate <= high)
  assert abs(np.mean(covered) - 0.95) < 0.01


def test_t_interval_is_students():
  mean, low, high = statistics.t_interval([1.0, 2.0, 3.0])
  half = 4.302653 / math.sqrt(3)  # the quantile for two degrees of freedom
  assert mean == 2 and low == pytest.approx(2 - half, rel=1e-6)
  assert high == pytest.approx(2 + half, rel=1e-6)


def test_one_value_bounds_nothing():
  assert statistics.t_interval([0.5]) == (0.5, -math.inf, math.inf)


def test_the_p_value_is_students():
  t = 2 * math.sqrt(3)  # of 1, 2, 3; by hand for two degrees of freedom
  expected = 1 - t / math.sqrt(2 + t * t)
  assert statistics.t_test([1.0, 2.0, 3.0]) == pytest.approx(expected)
  assert statistics.t_test([-3.0, -1.0, -2.0]) == pytest.approx(expected)
  assert statistics.t_test([-1.0, 1.0]) == pytest.approx(1)


def test_the_p_value_is_below_a_level_where_the_interval_excludes_zero():
  rng = np.random.default_rng(0)
  seen = set()
  for _ in range(200):
    values = rng.normal(0.8, 1, int(rng.integers(2, 7))).tolist()
    _, low, high = statistics.t_interval(values)
    seen.add(low > 0 or high < 0)
    assert (statistics.t_test(values) < 0.05) == (low > 0 or high < 0)
  assert seen == {True, False}


def test_where_there_is_no_test_there_is_no_certainty():
  assert statistics.t_test([2.0, 2.0]) == statistics.t_test([0.0] * 5) == 1
  for values in ([], [3.0], [1.0, math.nan], [1.0, math.inf]):
    assert math.isnan(statistics.t_test(values))


def test_holm_multiplies_by_what_is_left_and_never_falls():
  # Sorted: .005 x 4, .01 x 3, .03 x 2, and .04 x 1, no less than before it.
  assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
    [0.03, 0.06, 0.06, 0.02]
  )
  assert statistics.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
  assert statistics.holm([0.03]) == [0.03] and statistics.holm([]) == []


def test_holm_does_not_count_what_was_not_tested():
  corrected = statistics.holm([math.nan, 0.02, math.nan, 0.01])
  assert np.isnan(corrected)[[0, 2]].all()
  assert corrected[1::2] == pytest.approx([0.02, 0.02])


def test_expected_robustness_is_the_mean_under_the_curve():
  value = statistics.expected_robustness(
    [0, 1, 2, 3, 4], [0.8, 0.6, 0.4, 0.3, 0.2]
  )
  assert value == pytest.approx(0.45)
  assert statistics.expected_robustness([0, 0.1], [0.5, 0.5]) == pytest.approx(
    0.5
  )
  uneven = statistics.expected_robustness([0, 3, 4], [1.0, 1.0, 0.0])
  assert uneven == pytest.approx(3.5 / 4)


@pytest.mark.parametrize(
  "radii, accuracies",
  [([0.1, 0.2], [1, 1]), ([0, 0], [1, 1]), ([0], [1]), ([0, 1], [1])],
)
def test_a_curve_that_is_none_is_refused(radii, accuracies):
  with pytest.raises(ValueError, match="radii"):
    statistics.expected_robustness(radii, accuracies)
