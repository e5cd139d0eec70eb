"""Bars and histogram grids, parsed as XML: heights are proportional to values, and one scale serves a whole grid."""

# An element or attribute that is missing fails the test by itself.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false

import itertools
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.telemetry.axes import Axis
from sparse_lm.telemetry.bars import Histogram, bar_chart, histogram, histogram_grid

NS = "{http://www.w3.org/2000/svg}"
UNIT = Axis("position", low=0.0, high=1.0)


def bars(svg):
    return [{k: float(r.get(k)) for k in ("x", "y", "width", "height")} for r in ET.fromstring(svg).iter(f"{NS}rect")]


def words(svg):
    return [t.text for t in ET.fromstring(svg).iter(f"{NS}text")]


def test_counts_become_shares():
    assert histogram([1, 3]) == Histogram((0.25, 0.75))
    assert histogram([0, 0]) == Histogram((0.0, 0.0))


@pytest.mark.parametrize("counts", [[], [1, -1]])
def test_bad_counts_are_refused(counts):
    with pytest.raises(ValueError, match="at least one bin and no negative"):
        histogram(counts)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20))
def test_shares_sum_to_one_or_are_all_zero(counts):
    assert sum(histogram(counts).shares) == pytest.approx(1.0 if any(counts) else 0.0)


def test_heights_are_proportional_and_all_bars_stand_on_zero():
    found = bars(bar_chart([1.0, 2.0, 4.0], UNIT, Axis("%"), "t"))
    heights = [bar["height"] for bar in found]
    assert heights[1] / heights[0] == pytest.approx(2, rel=0.01)
    assert heights[2] / heights[0] == pytest.approx(4, rel=0.01)
    assert len({round(bar["y"] + bar["height"], 0) for bar in found}) == 1


def test_bars_are_even_and_keep_apart():
    found = bars(bar_chart([1.0] * 16, UNIT, Axis("%"), "t"))
    assert len(found) == 16
    for left, right in itertools.pairwise(found):
        assert right["x"] - left["x"] - left["width"] == pytest.approx(2, abs=0.2)


def test_nothing_is_drawn_for_zero_or_missing_values_and_tiny_ones_stay_visible():
    found = bars(bar_chart([0.0, None, 1e-9, 1.0], UNIT, Axis("%"), "t"))
    assert len(found) == 2
    assert found[0]["height"] >= 0.6


def test_a_chart_of_zeros_has_axes():
    svg = bar_chart([0.0, 0.0], UNIT, Axis("% of assignments"), "t")
    assert bars(svg) == []
    assert {"position", "% of assignments", "0"} <= set(words(svg))


def test_bars_need_values():
    with pytest.raises(ValueError, match="'drops' has no values"):
        bar_chart([], UNIT, Axis("%"), "drops")


def grid(cells, rows=("layer 1", "layer 2"), columns=("step 1", "step 9")):
    return histogram_grid(cells, rows, columns, Axis("gate <value>", low=0.0, high=1.0), "gates & steps")


def test_a_grid_has_one_scale_of_shares():
    low, high = Histogram((0.5, 0.5)), Histogram((1.0, 0.0))
    heights = [bar["height"] for bar in bars(grid([[low, high], [high, low]]))]
    assert len(heights) == 6  # two bars, one, one, two
    assert heights[2] == heights[3] == pytest.approx(2 * heights[0], rel=0.02)
    assert heights[0] == pytest.approx(heights[4], abs=0.11)


def test_a_grid_names_rows_columns_and_units():
    cell = Histogram((0.5, 0.5))
    svg = grid([[cell, cell], [cell, cell]])
    shown = words(svg)
    assert {"layer 1", "layer 2", "step 1", "step 9", "gate <value>", "share of choices (%)"} <= set(shown)
    assert ET.fromstring(svg).get("aria-label") == "gates & steps"
    # Only the bottom row carries x labels, and only the first column y labels.
    assert shown.count("1") == 2 and shown.count("50") == 2


def test_a_grid_grows_with_its_rows():
    cell = Histogram((1.0,))
    heights = [
        float(ET.fromstring(grid([[cell]] * n, [f"layer {i}" for i in range(n)], ["step 1"])).get("viewBox").split()[3])
        for n in (1, 2, 3)
    ]
    assert heights[2] - heights[1] == heights[1] - heights[0] > 60


def test_an_empty_histogram_leaves_its_panel_empty():
    empty = Histogram((0.0, 0.0))
    assert bars(grid([[empty, empty], [empty, empty]])) == []


@pytest.mark.parametrize("cells", [[], [[Histogram((1.0,))]], [[Histogram((1.0,))] * 2]])
def test_cells_must_match_their_names(cells):
    with pytest.raises(ValueError, match="for 2 x 2 names"):
        grid(cells)
