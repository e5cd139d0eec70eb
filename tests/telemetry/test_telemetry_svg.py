"""Line charts and heat maps, parsed as XML: points land where the axes say, text is escaped, labels keep apart."""

# An element or attribute that is missing fails the test by itself.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false

import base64
import itertools
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.telemetry.axes import Axis, make_scale
from sparse_lm.telemetry.colors import ColorScale
from sparse_lm.telemetry.svg import (
    CHAR,
    Frame,
    Reference,
    Series,
    Size,
    color_legend,
    heat_map,
    line_chart,
    num,
    x_axis,
    y_axis,
)

X = Axis("step", integer=True)
Y = Axis("nats / token")


def parse(svg):
    root = ET.fromstring(svg)
    for element in root.iter():
        element.tag = element.tag.removeprefix("{http://www.w3.org/2000/svg}")
    return root


def words(root):
    return [element.text for element in root.iter("text")]


def paths(root):
    return {path.get("data-name"): path for path in root.iter("path")}


def points(path):
    return [tuple(float(v) for v in pair.split(",")) for pair in re.split("[ML]", path.get("d"))[1:]]


def values(root, path):
    """What the tooltip script reads back from the pixels."""
    left, top, right, bottom = (float(v) for v in root.get("data-plot").split())
    (x0, x1, _), (y0, y1, _) = ([float(v) for v in root.get(name).split()] for name in ("data-x", "data-y"))
    return [
        (x0 + (x - left) / (right - left) * (x1 - x0), y0 + (bottom - y) / (bottom - top) * (y1 - y0))
        for x, y in points(path)
    ]


def test_points_read_back_as_their_values():
    xs, ys = [0, 50, 100], [1.0, 3.0, 2.5]
    root = parse(line_chart([Series("a", xs, ys, "#123456")], X, Y, "t"))
    read = values(root, paths(root)["a"])
    # The first point is there twice: a line of no length, drawn as a dot.
    assert read[0] == read[1]
    assert np.allclose(read[1:], list(zip(xs, ys, strict=True)), atol=0.03)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_every_point_is_inside_the_plot(ys):
    root = parse(line_chart([Series("a", range(len(ys)), ys, "#000")], X, Y, "t"))
    left, top, right, bottom = (float(v) for v in root.get("data-plot").split())
    for x, y in points(paths(root)["a"]):
        assert left - 0.1 <= x <= right + 0.1
        assert top - 0.1 <= y <= bottom + 0.1


def test_a_missing_value_leaves_a_gap_and_a_lonely_point_is_a_dot():
    root = parse(line_chart([Series("a", range(5), [1.0, 2.0, None, float("nan"), 3.0], "#000")], X, Y, "t"))
    d = paths(root)["a"].get("d")
    assert [len(re.findall("L", part)) for part in d.split("M")[1:]] == [2, 1]
    lonely = points(paths(root)["a"])[-2:]
    assert lonely[0] == lonely[1]


def test_a_series_without_any_value_draws_nothing():
    root = parse(line_chart([Series("a", [1, 2], [None, None], "#000")], X, Y, "t"))
    assert paths(root) == {}
    assert "nats / token" in words(root)


def test_a_logarithmic_axis_leaves_out_zero_and_spaces_decades_evenly():
    root = parse(line_chart([Series("a", range(4), [0.0, 1.0, 10.0, 100.0], "#000")], X, Axis("n", log=True), "t"))
    ys = [y for _, y in points(paths(root)["a"])][1:]
    assert len(ys) == 3
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert root.get("data-y").endswith(" 1")


def test_a_reference_is_drawn_at_its_value_and_named():
    svg = line_chart([Series("a", [0, 1], [2.0, 4.0], "#000")], X, Y, "t", [Reference("best possible", 1.5)])
    root = parse(svg)
    _left, top, right, bottom = (float(v) for v in root.get("data-plot").split())
    dashed = [line for line in root.iter("line") if line.get("stroke-dasharray") and float(line.get("x2")) > right - 1]
    (line,) = dashed
    low, high, _ = (float(v) for v in root.get("data-y").split())
    assert low + (bottom - float(line.get("y1"))) / (bottom - top) * (high - low) == pytest.approx(1.5, abs=0.02)
    assert low < 1.5
    assert {"a", "best possible"} <= set(words(root))


def test_references_differ_in_their_dashes_as_the_legend_says():
    two = [Reference("one", 1.0), Reference("two", 2.0)]
    root = parse(line_chart([Series("a", [0, 1], [1.0, 2.0], "#000")], X, Y, "t", two))
    dashes = [line.get("stroke-dasharray") for line in root.iter("line") if line.get("stroke-dasharray")]
    assert len(set(dashes)) == 2 and dashes[:2] == dashes[2:]


def test_one_series_needs_no_legend_and_a_hidden_one_is_not_named():
    one = parse(line_chart([Series("alone", [0, 1], [1, 2], "#000")], X, Y, "t"))
    assert "alone" not in words(one)
    hidden = Series("hidden", [0, 1], [1, 2], "#000", legend=False)
    three = [Series("a", [0, 1], [1, 2], "#000"), hidden, Series("b", [0, 1], [1, 2], "#000")]
    assert {"a", "b"} <= set(words(parse(line_chart(three, X, Y, "t"))))
    assert "hidden" not in words(parse(line_chart(three, X, Y, "t")))


def test_a_spike_of_a_faint_line_does_not_set_the_range():
    spiky = [1.0] * 200 + [1000.0] + [2.0] * 200
    faint = Series("raw", range(401), spiky, "#000", faint=True)
    solid = Series("mean", range(401), [1.5] * 401, "#000")
    root = parse(line_chart([solid, faint], X, Y, "t"))
    assert float(root.get("data-y").split()[1]) < 3
    # The faint line is drawn first, so that it lies behind.
    assert list(paths(root)) == ["raw", "mean"]


def test_markers_are_one_dot_a_point():
    root = parse(line_chart([Series("a", range(4), [1, None, 2, 3], "#abc", markers=True)], X, Y, "t"))
    assert [c.get("fill") for c in root.iter("circle")] == ["#abc"] * 3


def test_text_is_escaped_everywhere():
    evil = "<script>\"&'"
    series = [Series(evil, [0, 1], [1, 2], "#000"), Series("b", [0, 1], [1, 2], "#000")]
    svg = line_chart(series, Axis(evil), Axis(evil), evil, [Reference(evil, 1.0)])
    assert "<script" not in svg
    root = parse(svg)
    assert root.get("aria-label") == evil
    assert words(root).count(evil) == 4
    assert evil in paths(root)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="'loss' has 2 x and 1 y"):
        Series("loss", [1, 2], [1.0], "#000")


def extents(root, anchor):
    """(left, right) of the tick labels below the plot, in order."""
    bottom = float(root.get("data-plot").split()[3])
    ticks = [
        t for t in root.iter("text") if abs(float(t.get("y")) - bottom - 16) < 0.06 and t.get("text-anchor") == anchor
    ]
    return [(float(t.get("x")) - CHAR * len(t.text) / 2, float(t.get("x")) + CHAR * len(t.text) / 2) for t in ticks]


@given(st.integers(0, 10**6), st.integers(1, 10**7))
def test_tick_labels_do_not_collide_nor_leave_the_chart(low, span):
    root = parse(line_chart([Series("a", [low, low + span], [1e-7, 3e5], "#000")], X, Y, "t"))
    spans = extents(root, "middle")
    assert len(spans) >= 2
    assert all(left[1] < right[0] for left, right in itertools.pairwise(spans))
    assert spans[-1][1] <= Size().width
    assert all(float(t.get("x")) - CHAR * len(t.text) >= 0 for t in root.iter("text") if t.get("text-anchor") == "end")


@given(st.lists(st.text(alphabet="abcdefgh ", min_size=1, max_size=30), min_size=2, max_size=8, unique=True))
def test_legend_entries_wrap_inside_the_chart_and_above_the_plot(names):
    root = parse(line_chart([Series(name, [0, 1], [0, 1], "#000") for name in names], X, Y, "t"))
    top = float(root.get("data-plot").split()[1])
    entries = [t for t in root.iter("text") if t.get("fill") == "#222222"]
    assert len(entries) == len(names)
    boxes = sorted((float(t.get("y")), float(t.get("x")), float(t.get("x")) + CHAR * len(t.text)) for t in entries)
    assert all(right <= Size().width and y < top - 12 for y, _, right in boxes)
    for (y, _, right), (other_y, left, _) in itertools.pairwise(boxes):
        assert y != other_y or right < left


def test_a_long_name_is_cut():
    root = parse(line_chart([Series("n" * 90, [0], [1], "#000"), Series("b", [0], [1], "#000")], X, Y, "t"))
    assert "n" * 39 + "…" in words(root)
    assert "n" * 90 in paths(root)


def test_coordinates_are_short():
    assert [num(v) for v in (1.0, 1.25, 100.04, -0.5)] == ["1", "1.2", "100", "-0.5"]


def test_axes_place_their_labels():
    frame = Frame(50, 20, 450, 220)
    below = parse(f"<svg>{x_axis(frame, make_scale(Axis('s'), [0, 100], 50, 450), Axis('my step'))}</svg>")
    assert words(below) == ["0", "20", "40", "60", "80", "100", "my step"]
    beside = parse(f"<svg>{y_axis(frame, make_scale(Axis('y'), [0, 1], 220, 20), [0, 1], ['0', '1'], 'share')}</svg>")
    assert [(t.text, t.get("y")) for t in beside.iter("text")] == [("share", "12"), ("0", "224"), ("1", "24")]


HEAT_X = Axis("step", low=0, high=100)


def test_a_heat_map_carries_its_cells_and_its_image():
    ratios = np.array([[1.0, 4.0, np.nan], [0.25, 1.0, 1.0]])
    root = parse(heat_map(ratios, HEAT_X, Axis("expert"), "t", ColorScale(4)))
    assert (root.get("data-rows"), root.get("data-columns"), root.get("data-most")) == ("2", "3", "4")
    assert list(base64.b64decode(root.get("data-cells"))) == [127, 254, 255, 0, 127, 127]
    (image,) = root.iter("image")
    assert image.get("href").startswith("data:image/png;base64,iVBOR")
    assert image.get("style") == "image-rendering:pixelated"
    left, top, right, bottom = (float(v) for v in root.get("data-plot").split())
    assert float(image.get("width")) == pytest.approx(right - left, abs=0.2)
    assert float(image.get("height")) == pytest.approx(bottom - top, abs=0.2)


@pytest.mark.parametrize(("rows", "labels"), [(1, ["0"]), (4, ["0", "1", "2", "3"]), (32, None), (256, None)])
def test_experts_are_labelled_at_the_middle_of_their_rows(rows, labels):
    root = parse(heat_map(np.ones((rows, 2)), HEAT_X, Axis("expert"), "t"))
    _, top, _, bottom = (float(v) for v in root.get("data-plot").split())
    shown = [t for t in root.iter("text") if t.get("text-anchor") == "end"]
    assert labels is None or [t.text for t in shown] == labels
    for t in shown:
        middle = top + (int(t.text) + 0.5) * (bottom - top) / rows
        assert float(t.get("y")) - 4 == pytest.approx(middle, abs=0.1)
    heights = [float(t.get("y")) for t in shown]
    assert all(later - earlier > 11 for earlier, later in itertools.pairwise(heights))


def test_a_heat_map_needs_cells_and_ends():
    with pytest.raises(ValueError, match=r"'load' of shape \(0, 3\)"):
        heat_map(np.empty((0, 3)), HEAT_X, Axis("expert"), "load")
    with pytest.raises(ValueError, match="x from None"):
        heat_map(np.ones((1, 1)), Axis("step"), Axis("expert"), "load")


def test_the_legend_of_colours_names_ends_and_middle():
    root = parse(color_legend(ColorScale(4), "load <x>"))
    assert words(root) == ["load <x>", "≤ 0.25", "0.5", "1", "2", "≥ 4"]
    (strip,) = root.iter("image")
    middle = float(strip.get("x")) + float(strip.get("width")) / 2
    assert [float(t.get("x")) for t in root.iter("text") if t.text == "1"] == [middle]
