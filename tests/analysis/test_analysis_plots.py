"""Maps of named cells: well-formed, each cell in its place and colour, names readable."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from sparse_lm.analysis.plots import COLORS, MOST_CELLS, Signed, cell_map, signed_legend

SVG = "{http://www.w3.org/2000/svg}"


def draw(ratios, rows, columns):
    return ET.fromstring(cell_map(np.asarray(ratios, float), rows, columns, "a <map>", lambda i, j: f"{i} & {j}"))


def test_cells_have_their_colour_place_and_words():
    root = draw([[1, 4, np.nan], [0.25, 1, 2]], ["top", "bottom"], ["a", "b", "c"])
    cells = {cell.findtext(f"{SVG}title"): cell for cell in root.iter(f"{SVG}rect")}
    assert set(cells) == {"0 & 0", "0 & 1", "1 & 0", "1 & 1", "1 & 2"}  # the missing one is left white
    assert cells["0 & 1"].get("fill") == COLORS.color(4) and cells["1 & 0"].get("fill") == COLORS.color(0.25)
    assert cells["0 & 0"].get("fill") == COLORS.color(1)
    x, y = ({key: float(cell.get(axis, "")) for key, cell in cells.items()} for axis in "xy")
    assert x["0 & 0"] == x["1 & 0"] < x["0 & 1"] < x["1 & 2"] and y["0 & 0"] == y["0 & 1"] < y["1 & 0"]
    names = {element.text for element in root.iter(f"{SVG}text")}
    assert {"top", "bottom", "a", "b", "c"} == names


def test_everything_lies_within_the_picture():
    root = draw(
        np.ones((30, 14)), [f"expert number {i}" for i in range(30)], [f"a rather long name {i}" for i in range(14)]
    )
    _, _, width, height = map(float, root.get("viewBox", "").split())
    for cell in root.iter(f"{SVG}rect"):
        assert 0 <= float(cell.get("x", "")) <= width - float(cell.get("width", ""))
        assert 0 <= float(cell.get("y", "")) <= height - float(cell.get("height", ""))
    turned = [element for element in root.iter(f"{SVG}text") if element.get("transform")]
    assert len(turned) == 14 and all(len(element.text or "") <= 20 for element in turned)


def test_short_names_stand_upright_and_many_are_thinned():
    assert not any(element.get("transform") for element in draw(np.ones((2, 3)), "ab", "xyz").iter(f"{SVG}text"))
    many = [str(i) for i in range(200)]
    names = [element.text for element in draw(np.ones((1, 200)), ["only"], many).iter(f"{SVG}text")]
    assert 10 < len(names) < 60 and names[0] == "0"
    tall = [element.text for element in draw(np.ones((200, 1)), many, ["only"]).iter(f"{SVG}text")]
    assert 10 < len(tall) < 80


def test_a_large_map_is_one_picture():
    side = int(MOST_CELLS**0.5) + 1
    root = draw(np.ones((side, side)), [str(i) for i in range(side)], [str(i) for i in range(side)])
    assert not list(root.iter(f"{SVG}rect"))
    (image,) = root.iter(f"{SVG}image")
    assert image.get("href", "").startswith("data:image/png;base64,")


def test_names_that_do_not_fit_are_refused():
    for shape, rows in (((2, 2), "abc"), ((2, 3), "ab"), ((0, 2), "")):
        with pytest.raises(ValueError, match="a <map>"):
            draw(np.ones(shape), list(rows), ["x", "y"])


def test_signed_colours_are_neutral_at_zero_and_end_at_the_most():
    scale = Signed(0.02)
    ratios = scale.ratios(np.array([0.0, 0.02, -0.02, 0.01, np.nan]))
    np.testing.assert_allclose([COLORS.share(r) for r in ratios[:4]], [0.5, 1, 0, 0.75])
    assert np.isnan(ratios[4])
    np.testing.assert_array_equal(Signed(0.0).ratios(np.zeros(2)), 1.0)
    words = [element.text for element in ET.fromstring(signed_legend(scale, "change")).iter(f"{SVG}text")]
    assert words == ["change", "≤ -0.02", "-0.01", "0", "+0.01", "≥ +0.02"]
