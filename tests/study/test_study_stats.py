"""Statistics over few seeds, against values computed by hand and distributions that are known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.study import stats

FEW = st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=2, max_size=5)


def test_mean_and_standard_error():
    found = stats.summary([1.0, 2.0, 3.0])
    # standard deviation 1, divided by sqrt(3)
    assert (found.mean, found.n) == (2.0, 3)
    assert found.standard_error == pytest.approx(1 / math.sqrt(3))
    assert stats.summary([4.0]) == stats.Summary(4.0, None, 1)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_what_has_no_mean_is_refused(values):
    with pytest.raises(ValueError, match="values"):
        stats.summary(values)


@pytest.mark.parametrize("function", [stats.bootstrap_interval, stats.t_interval, stats.smallest_detectable])
def test_one_seed_has_no_interval(function):
    with pytest.raises(ValueError, match="need at least 2, run more seeds"):
        function([1.0])


def test_three_seeds_span_smallest_to_largest():
    # P(all three draws are the smallest) = 1/27 = 3.7 %, more than the tail of 2.5 %
    found = stats.bootstrap_interval([0.3, -0.1, 0.2])
    assert (found.low, found.high) == pytest.approx((-0.1, 0.3)) and found.exact


def test_two_thirds_of_three_seeds_by_hand():
    # The mean of three draws from 0, 0, 3 is the binomial count of 3s with p = 1/3: 8, 12, 6, 1 of 27 for 0, 1, 2, 3.
    # Confidence 0.2 asks for tails of the t quantile 0.1421 (2 degrees of freedom) * sqrt(1.5): 0.431.
    tail = scipy.stats.norm.cdf(-math.sqrt(1.5) * scipy.stats.t.ppf(0.6, 2))
    assert 12 / 27 > tail > 8 / 27 and 7 / 27 < tail < 19 / 27
    assert stats.bootstrap_interval([0.0, 0.0, 3.0], confidence=0.2) == stats.Interval(1.0, 1.0, True)


@given(FEW)
def test_enumeration_is_that_of_all_ordered_resamples(values):
    means, weights = stats._all_resamples(np.sort(np.array(values)))
    naive = np.array([np.mean(draw) for draw in itertools.product(values, repeat=len(values))])
    assert weights.sum() == pytest.approx(1)
    assert (means * weights).sum() == pytest.approx(np.mean(values), abs=1e-9)
    assert (means**2 * weights).sum() == pytest.approx((naive**2).mean(), abs=1e-8)


@given(FEW, st.floats(-5, 5), st.floats(0.1, 3))
def test_intervals_move_and_stretch_with_the_values(values, shift, factor):
    before = stats.bootstrap_interval(values)
    after = stats.bootstrap_interval([factor * value + shift for value in values])
    assert after.low == pytest.approx(factor * before.low + shift, abs=1e-6)
    assert after.high == pytest.approx(factor * before.high + shift, abs=1e-6)
    mirrored = stats.bootstrap_interval([-value for value in values])
    assert mirrored.low == pytest.approx(-before.high, abs=1e-9)
    assert min(values) - 1e-9 <= before.low <= before.high <= max(values) + 1e-9


def test_many_seeds_are_drawn_repeatably_and_agree_with_student():
    values = np.random.default_rng(1).normal(0.5, 1.0, 60).tolist()
    drawn, again = stats.bootstrap_interval(values, seed=3), stats.bootstrap_interval(values, seed=3)
    assert drawn == again and not drawn.exact
    student = stats.t_interval(values)
    assert drawn.low == pytest.approx(student.low, abs=0.05) and drawn.high == pytest.approx(student.high, abs=0.05)


def test_student_by_hand():
    # mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.302653
    found = stats.t_interval([1.0, 2.0, 3.0])
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)


def test_coverage_of_normal_differences():
    generator = np.random.default_rng(0)
    for n, least, most in ((3, 0.68, 0.82), (8, 0.91, 0.985)):
        covered = 0
        for _ in range(400):
            found = stats.bootstrap_interval(generator.normal(0, 1, n).tolist())
            covered += found.low <= 0 <= found.high
        # With three seeds the interval covers in 1 - 2 / 2**3 = 75 %: what `luck` tells.
        assert least < covered / 400 < most


@pytest.mark.parametrize(("n", "chance"), [(0, 1.0), (1, 1.0), (2, 0.25), (3, 0.125), (5, 0.03125), (10, 0.025)])
def test_luck(n, chance):
    assert stats.luck(n) == pytest.approx(chance)


def test_smallest_detectable_by_hand():
    # t(0.975, 2) = 4.302653, t(0.8, 2) = 1.060660
    assert stats.smallest_detectable([1.0, 2.0, 3.0]) == pytest.approx((4.302653 + 1.060660) / math.sqrt(3), abs=1e-5)


def test_a_detectable_difference_is_detected_about_as_often_as_promised():
    generator, n, hits = np.random.default_rng(2), 8, 0
    # With known spread 1 the detectable difference is (t + t) / sqrt(8).
    quantiles = scipy.stats.t.ppf([0.975, 0.8], n - 1)
    difference = float(quantiles.sum()) / math.sqrt(n)
    for _ in range(400):
        hits += stats.t_interval(generator.normal(difference, 1, n).tolist()).low > 0
    assert 0.74 < hits / 400 < 0.88
