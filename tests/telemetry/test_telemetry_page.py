"""The frame of the page: well-formed XML, escaped text, nothing loaded from elsewhere."""

# An element or attribute that is missing fails the test by itself.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false

import re
import xml.etree.ElementTree as ET

from sparse_lm.telemetry.figures import Figure
from sparse_lm.telemetry.page import SCRIPT, STYLE, cards, flatten, folded, page, table, tile

EVIL = "<b>\"x\" & 'y'</b>"


def text_of(markup):
    return "".join(ET.fromstring(f"<x>{markup}</x>").itertext())


def test_a_page_is_well_formed_and_carries_its_style_and_script():
    root = ET.fromstring(page(EVIL, "<p>hello</p>"))
    assert root.find("head/title").text == EVIL
    assert root.find("head/style").text == STYLE
    assert root.find("body/script").text == SCRIPT
    assert root.find("body/p").text == "hello"
    assert root.find("head/meta").get("charset") == "utf-8"


def test_nothing_comes_from_elsewhere():
    assert re.findall(r"(?:src|href|url|import)\s*[=(]?\s*[\"']?(?:https?:)?//", page("t", "")) == []


def test_style_and_script_mean_the_same_as_html_and_as_xml():
    for content in (STYLE, SCRIPT):
        assert "<" not in content and "&" not in content


def test_braces_of_style_and_script_match():
    for content in (STYLE, SCRIPT):
        assert content.count("{") == content.count("}")
        assert content.count("(") == content.count(")")


def test_tiles_escape_their_words():
    markup = tile(EVIL, "1.5", EVIL)
    assert "<b>&quot;" not in markup
    assert text_of(markup) == f"{EVIL}1.5{EVIL}"


def test_cards_hold_heading_caption_and_chart():
    markup = cards([Figure(EVIL, "caption &", "<svg/>"), Figure("two", "", "<svg/>")])
    root = ET.fromstring(markup)
    assert root.get("class") == "grid"
    first, second = root.findall("figure")
    assert (first.find("h3").text, first.find("figcaption").text) == (EVIL, "caption &")
    assert second.find("svg") is not None
    assert ET.fromstring(cards([Figure("a", "b", "<svg/>")], small=True)).get("class") == "grid small"
    assert cards([]) == ""


def test_tables_escape_cells_and_align_numbers():
    root = ET.fromstring(table(("name", "count"), [(EVIL, "1"), ("b", "2")], numeric=(1,)))
    rows = root.findall("table/tr")
    assert [cell.text for cell in rows[0]] == ["name", "count"]
    assert [cell.text for cell in rows[1]] == [EVIL, "1"]
    assert [cell.get("class") for cell in rows[2]] == [None, "n"]


def test_trees_are_flattened_to_dotted_keys():
    tree = {"a": {"b": {"c": 1, "d": None}, "e": [1, 2]}, "f": [], "g": True}
    assert flatten(tree) == [("a.b.c", "1"), ("a.b.d", "off"), ("a.e", "1, 2"), ("f", "none"), ("g", "True")]


def test_folded_tables_are_closed_and_hold_every_leaf():
    root = ET.fromstring(folded("model & co", {"a": {"b": "<i>"}}))
    assert root.tag == "details" and root.get("open") is None
    assert root.find("summary").text == "model & co"
    assert [cell.text for cell in root.iter("td")] == ["a.b", "<i>"]
    assert [cell.text for cell in ET.fromstring(folded("commit", "0123")).iter("td")] == ["commit", "0123"]
