"""What a notebook shows is the page as it was written, in a frame that keeps it apart."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from sparse_lm.telemetry.figures import Figure
from sparse_lm.telemetry.inline import Inline, inline_figures, inline_page
from sparse_lm.telemetry.page import page

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"><text x="0" y="0">a &amp; b</text></svg>'


def frame(shown: Inline) -> ET.Element:
    return ET.fromstring(shown._repr_html_())


def test_a_page_comes_through_unchanged(tmp_path):
    document = page("a <run>", '<p title="x">5 &lt; 6 &amp; "quoted" \'too\' é</p>')
    (tmp_path / "report.html").write_text(document, encoding="utf-8")
    for path in (tmp_path / "report.html", str(tmp_path / "report.html")):
        found = frame(inline_page(path, height=321))
        assert found.tag == "iframe" and found.get("height") == "321"
        # Line ends within an attribute are blanks to an XML parser, and kept by an HTML one.
        assert found.get("srcdoc") == document.replace("\n", " ")


def test_the_frame_may_run_the_tooltips_and_nothing_else(tmp_path):
    assert frame(Inline("<p/>", 10)).get("sandbox") == "allow-scripts"


def test_figures_stand_side_by_side_with_their_words():
    shown = inline_figures(Figure("One", "first", SVG), Figure("Two", "second <b>", SVG))
    assert shown.document.count("<svg") == 2
    assert "<h3>One</h3><figcaption>first</figcaption>" in shown.document and "second &lt;b&gt;" in shown.document
    ET.fromstring(shown.document.removeprefix("<!DOCTYPE html>\n"))
    assert frame(shown).get("srcdoc", "").startswith("<!DOCTYPE html>")


def test_its_repr_is_short():
    assert repr(Inline("x" * 12345, 10)) == "Inline(document of 12,345 characters, height=10)"


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"report\.html does not exist; write the page first"):
        inline_page(tmp_path / "report.html")
    with pytest.raises(ValueError, match="no figure"):
        inline_figures()
