"""Means, spreads and Student's confidence interval over seeds."""

import math

import pytest
from scipy import stats

from trompe.over_seeds import over_seeds


def test_three_values_by_hand() -> None:
    found = over_seeds([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)  # t of 2 degrees of freedom, 97.5 %
    assert (found.seeds, found.mean, found.std) == (3, 2.0, 1.0)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), abs=1e-6)
    assert found.text(1) == "2.0 ± 1.0 [-0.5, 4.5]"
    assert found.text(1, interval=False) == "2.0 ± 1.0"


def test_the_interval_is_that_of_a_t_test() -> None:
    values = [0.91, 0.97, 0.95, 0.93, 0.99]
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = over_seeds(values)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_one_value_has_no_spread_and_none_is_no_number() -> None:
    assert over_seeds([0.5]).text(2) == "0.50"
    assert math.isnan(over_seeds([0.5]).std)
    gap = over_seeds([0.5, None])
    assert all(map(math.isnan, (gap.mean, gap.std, gap.low, gap.high)))
