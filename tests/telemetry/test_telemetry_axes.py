"""Ticks and labels by hand, and as properties: round, inside, evenly spaced, few, distinct."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sparse_lm.telemetry.axes import Axis, Scale, log_ticks, make_scale, nice_ticks, tick_labels, ticks_of


@pytest.mark.parametrize(
    ("low", "high", "count", "ticks"),
    [
        (0, 10, 5, [0, 2, 4, 6, 8, 10]),
        (0, 1, 4, [0, 0.25, 0.5, 0.75, 1]),
        (0.13, 0.97, 4, [0.25, 0.5, 0.75]),
        (-1.2, 1.2, 3, [-1, 0, 1]),
        (1.9, 2.1, 2, [1.9, 2.0, 2.1]),
        (0, 0.3, 3, [0, 0.1, 0.2, 0.3]),
        (1, 100_000, 4, [25_000, 50_000, 75_000, 100_000]),
        (0, 3e-4, 3, [0, 1e-4, 2e-4, 3e-4]),
    ],
)
def test_nice_ticks(low, high, count, ticks):
    assert nice_ticks(low, high, count) == pytest.approx(ticks, abs=1e-15)


def test_nice_ticks_carry_no_binary_dust():
    assert nice_ticks(0, 0.3, 3)[-1] == 0.3


def test_integer_ticks_are_whole_even_when_there_is_room_for_more():
    assert nice_ticks(0, 3, 10, integer=True) == [0, 1, 2, 3]
    assert nice_ticks(0, 10, 4, integer=True) == [0, 5, 10]


@pytest.mark.parametrize(("low", "high", "count"), [(1, 1, 4), (2, 1, 4), (0, 1, 0), (0, math.nan, 3)])
def test_nice_ticks_refuse_an_empty_range(low, high, count):
    with pytest.raises(ValueError, match="need low < high"):
        nice_ticks(low, high, count)


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(1, 12))
def test_nice_ticks_are_inside_even_round_and_few(low, span, count):
    high = low + span
    assume(span > 1e-6 * abs(low))
    ticks = nice_ticks(low, high, count)
    assert len(ticks) <= count + 1
    slack = 1e-6 * span
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    if len(ticks) > 2:
        steps = np.diff(ticks)
        assert steps == pytest.approx(steps[0], rel=1e-3)
        mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-6)
        assert min(abs(mantissa - nice) for nice in (1, 2, 2.5, 5)) < 1e-2


@pytest.mark.parametrize(
    ("low", "high", "count", "ticks"),
    [
        (1, 10, 5, [1, 2, 5, 10]),
        (0.15, 2.3, 6, [0.2, 0.5, 1, 2]),
        (1, 1000, 8, [1, 3, 10, 30, 100, 300, 1000]),
        (1, 1000, 5, [1, 10, 100, 1000]),
        (1e-6, 1e6, 7, [1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6]),
    ],
)
def test_log_ticks(low, high, count, ticks):
    assert log_ticks(low, high, count) == pytest.approx(ticks)


def test_log_ticks_of_a_narrow_range_are_even():
    assert log_ticks(6, 9, 6) == [6, 7, 8, 9]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-1, 1), (3, 3)])
def test_log_ticks_refuse_what_has_no_logarithm(low, high):
    with pytest.raises(ValueError, match="need 0 < low < high"):
        log_ticks(low, high, 5)


@given(st.floats(1e-12, 1e12), st.floats(1.01, 1e12), st.integers(2, 9))
def test_log_ticks_are_inside_and_at_least_two_when_they_span_decades(low, ratio, count):
    ticks = log_ticks(low, low * ratio, count)
    assert all(low * 0.999 <= tick <= low * ratio * 1.001 for tick in ticks)
    assert sorted(ticks) == ticks
    assert len(ticks) <= max(3, count + 1)
    assert len(ticks) >= 2 or ratio < 2


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0, 0.25, 0.5], ["0", "0.25", "0.50"]),
        ([0, 500, 1000], ["0", "500", "1000"]),
        ([0, 10_000, 20_000], ["0", "10k", "20k"]),
        ([0, 2500, 12_500], ["0", "2.5k", "12.5k"]),
        ([9970, 9980, 10_000], ["9970", "9980", "10000"]),
        ([1_000_000, 1_500_000], ["1.0M", "1.5M"]),
        ([0, 1e-4, 2e-4], ["0", "1e-4", "2e-4"]),
        ([0, 2.5e-4, 5e-4], ["0", "2.5e-4", "5.0e-4"]),
        ([-1, 0, 1], ["-1", "0", "1"]),
        ([0], ["0"]),
        ([], []),
    ],
)
def test_tick_labels(ticks, labels):
    assert tick_labels(ticks) == labels


def test_logarithmic_labels_stand_each_for_themselves():
    assert tick_labels([0.001, 1, 1000, 1e6], log=True) == ["0.001", "1", "1k", "1M"]


@given(st.floats(-1e6, 1e6), st.floats(1e-5, 1e9), st.integers(1, 8))
def test_labels_of_nice_ticks_are_distinct(low, span, count):
    assume(span > 1e-4 * abs(low))
    labels = tick_labels(nice_ticks(low, low + span, count))
    assert len(set(labels)) == len(labels)


def test_a_scale_maps_its_ends_to_its_pixels():
    scale = Scale(10, 30, 100, 300)
    assert [scale(value) for value in (10, 20, 30, 40)] == [100, 200, 300, 400]
    downwards = Scale(0, 1, 200, 0)
    assert [downwards(value) for value in (0, 0.25, 1)] == [200, 150, 0]


def test_a_logarithmic_scale_gives_decades_equal_room():
    scale = Scale(1, 1000, 0, 300, log=True)
    assert [scale(value) for value in (1, 10, 100, 1000)] == pytest.approx([0, 100, 200, 300])


def test_what_a_scale_can_show():
    linear, logarithmic = Scale(0, 1, 0, 1), Scale(1, 10, 0, 1, log=True)
    assert linear.shows(-5.0) and linear.shows(0.0)
    assert logarithmic.shows(0.1) and not logarithmic.shows(0.0) and not logarithmic.shows(-1.0)
    assert not any(linear.shows(value) for value in (None, math.nan, math.inf))


@pytest.mark.parametrize(
    ("axis", "values", "ends"),
    [
        (Axis("a"), [1, 3, 2], (1, 3)),
        (Axis("a", low=0), [1, 3], (0, 3)),
        (Axis("a", low=0, high=9), [], (0, 9)),
        (Axis("a"), [], (0, 1)),
        (Axis("a", low=5), [], (5, 6)),
        (Axis("a", log=True), [], (1, 10)),
        (Axis("a"), [None, math.nan, 2, 4], (2, 4)),
        (Axis("a", log=True), [0, -3, 2, 8], (2, 8)),
        (Axis("a"), [5], (4.5, 5.5)),
        (Axis("a", integer=True), [5], (4.5, 5.5)),
        (Axis("a"), [0], (-1, 1)),
        (Axis("a", low=0), [0, 0], (0, 1)),
        (Axis("a", log=True), [8], (4, 16)),
    ],
)
def test_the_ends_of_a_scale(axis, values, ends):
    scale = make_scale(axis, values, 0, 100)
    assert (scale.low, scale.high) == pytest.approx(ends)


def test_padding_leaves_fixed_ends_alone():
    scale = make_scale(Axis("a", low=0), [50, 100], 0, 100, pad=True)
    assert (scale.low, scale.high) == (0, 104)
    scale = make_scale(Axis("a"), [0, 100], 0, 100, pad=True)
    assert (scale.low, scale.high) == (-4, 104)
    scale = make_scale(Axis("a", log=True), [1, 100], 0, 100, pad=True)
    assert (scale.low, scale.high) == pytest.approx((100**-0.04, 100**1.04))


def test_ticks_follow_the_kind_of_scale():
    assert ticks_of(Scale(1, 1000, 0, 1, log=True), 5) == [1, 10, 100, 1000]
    assert ticks_of(Scale(0, 4, 0, 1), 2) == [0, 2, 4]
