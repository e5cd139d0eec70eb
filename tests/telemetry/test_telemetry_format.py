"""Numbers and durations for people: hand-computed words, and that rounding never shows 1000k or 60s."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.telemetry.format import MISSING, compact, duration, grouped, markdown_table, percent


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (5, "5"),
        (0.5, "0.5"),
        (999, "999"),
        (1000, "1k"),
        (12_345, "12.3k"),
        (-12_345, "-12.3k"),
        (999_949, "1M"),
        (999_400, "999k"),
        (1_234_567, "1.23M"),
        (7e9, "7B"),
        (2.5e12, "2.5T"),
        (0.0123, "0.0123"),
        (0.000034, "3.4e-5"),
        (None, MISSING),
        (math.inf, "inf"),
    ],
)
def test_compact(value, words):
    assert compact(value) == words


def test_compact_takes_as_many_digits_as_asked():
    assert (compact(1234567, 2), compact(1234567, 5)) == ("1.2M", "1.2346M")


@given(st.floats(min_value=1e-6, max_value=1e14))
def test_compact_is_within_half_a_unit_of_the_third_digit(value):
    shown = re.fullmatch(r"([\d.e+-]+)([kMBT]?)", compact(value))
    assert shown is not None
    size = {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[shown[2]]
    assert float(shown[1]) * size == pytest.approx(value, rel=0.00501)
    assert float(shown[1]) < 1000 or value >= 1e15


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0s"),
        (0.44, "0.4s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (80, "1m20s"),
        (3599.4, "59m59s"),
        (3599.7, "1h00m"),
        (11_100, "3h05m"),
        (86_399, "1d00h"),
        (187_200, "2d04h"),
        (None, MISSING),
        (math.nan, MISSING),
        (math.inf, MISSING),
    ],
)
def test_duration(seconds, words):
    assert duration(seconds) == words


@given(st.floats(min_value=0, max_value=1e7))
def test_duration_is_never_off_by_more_than_its_smaller_unit(seconds):
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    parts = re.findall(r"([\d.]+)([smhd])", duration(seconds))
    total = sum(float(count) * units[unit] for count, unit in parts)
    assert abs(total - seconds) <= units[parts[-1][1]] * 0.51 + 31 * (parts[-1][1] == "h")


def test_percent_and_grouped():
    assert (percent(0.0123), percent(0), percent(1), percent(None)) == ("1.2%", "0%", "100%", MISSING)
    assert percent(0.41234, digits=3) == "41.2%"
    assert (grouped(1234567), grouped(12.6), grouped(None)) == ("1,234,567", "13", MISSING)


def test_a_table_in_markdown_has_its_bars_escaped():
    table = markdown_table(["a", "b"], [["1", "x|y"], ("2", "")])
    assert table == "| a | b |\n| --- | --- |\n| 1 | x\\|y |\n| 2 |  |"
