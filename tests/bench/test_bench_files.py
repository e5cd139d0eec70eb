"""What was measured is in the files beside the JSON, number by number."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from xml.etree import ElementTree

import pytest

from sparse_lm.bench.files import bars, lines, to_csv, to_svg, write
from sparse_lm.bench.harness import Comparison, Drawn, Machine, Paired, Report
from sparse_lm.bench.startup import Phases, Start
from sparse_lm.config import ConfigError

MACHINE = Machine("a cpu, fast", 2, 1.5, "3.11", "0.10", "cpu", "cpu", 1, None)
ROW = Comparison("sparse", "dense <twin>", Paired(1.5, 1.0, 2.0, 3.0, 2.0, 1), 6, 12.0, 12.0, 8.0)
START = Start("cold", Phases(1.0, 0.5, 2.0, 3.0, 0.25, 1), 9.0, ROW.paired)
REPORT = Report("moe_layer", MACHINE, [ROW, ROW], "2026-01-02")
STARTUP = Report("startup", MACHINE, [START, dataclasses.replace(START, case="warm", ratio=None)], "2026-01-02")
SVG = "{http://www.w3.org/2000/svg}"


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_csv_has_every_number_and_the_machine():
    first, second = csv.DictReader(io.StringIO(to_csv(REPORT)))
    assert first == second
    assert (first["benchmark"], first["case"], first["ratio"], first["share_of_peak"]) == (
        "moe_layer", "sparse", "1.5", "0.5",
    )  # fmt: skip
    assert (first["cpu"], first["load"], first["date"]) == ("a cpu, fast", "1.5", "2026-01-02")
    assert ROW.to_json().keys() <= first.keys()


def test_nested_numbers_have_columns_and_missing_ones_are_empty():
    cold, warm = csv.DictReader(io.StringIO(to_csv(STARTUP)))
    assert (cold["cold_over_warm.ratio"], cold["first_step_seconds"]) == ("1.5", "3.0")
    assert warm["cold_over_warm.ratio"] == ""


def test_bars_are_as_long_as_their_numbers():
    drawn = [Drawn("one", {"a": 1.0, "b": 2.0}, "ms"), Drawn("two & more", {"a": 4.0, "b": 0.5}, "ms")]
    svg = bars(drawn, "a title")
    found = [element for element in ElementTree.fromstring(svg).iter(f"{SVG}rect") if element.get("height") == "11"]
    widths = [float(element.attrib["width"]) for element in found]
    assert len(widths) == 4
    assert widths == pytest.approx([widths[0] * n for n in (1, 2, 4, 0.5)], abs=0.2)
    assert {"a title", "one", "two & more", "a", "b", "ms", "4"} <= set(texts(svg))


def test_lines_are_named_by_what_they_connect():
    drawn = [
        Drawn(f"{n}", {"measured": float(n), "limit": 1.0}, "ms", x=n, line=line)
        for line in ("gather", "dropless")
        for n in (8, 64)
    ]
    svg = lines(drawn, "a title")
    names = [element.get("data-name") for element in ElementTree.fromstring(svg).iter(f"{SVG}path")]
    assert names == ["gather measured", "gather limit", "dropless measured", "dropless limit"]
    assert "data-kind" not in svg


def test_the_kind_of_plot_follows_the_rows():
    assert "sparse / dense <twin>" in texts(to_svg(REPORT))
    assert {"cold", "warm", "first step", "process"} <= set(texts(to_svg(STARTUP)))
    with pytest.raises(ValueError, match="'moe_layer' has no rows"):
        to_svg(dataclasses.replace(REPORT, rows=[]))


def test_what_rows_draw_by_hand():
    # 6 tokens in 3 s and in 2 s; 12 FLOPs at 8 a second take 1.5 s.
    assert ROW.drawn().values == {"measured": 2.0, "against": 3.0, "limit": 4.0}
    assert START.drawn().values == {
        "imports": 1.0, "data": 0.5, "state": 2.0, "first_step": 3.0, "later_step": 0.25, "process": 9.0,
    }  # fmt: skip


def test_one_benchmark_has_the_name_of_the_file(tmp_path):
    write([REPORT], tmp_path / "found.json", together=False)
    assert {file.name for file in tmp_path.iterdir()} == {"found.json", "found.csv", "found.svg"}
    assert json.loads((tmp_path / "found.json").read_text())["name"] == "moe_layer"
    assert (tmp_path / "found.csv").read_text() == to_csv(REPORT)


def test_several_have_their_own(tmp_path):
    write([REPORT, STARTUP], tmp_path / "all.json", together=True)
    beside = {f"all-{name}.{ending}" for name in ("moe_layer", "startup") for ending in ("csv", "svg")}
    assert {file.name for file in tmp_path.iterdir()} == {"all.json", *beside}
    assert [report["name"] for report in json.loads((tmp_path / "all.json").read_text())] == ["moe_layer", "startup"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        write([REPORT], tmp_path / "missing" / "found.json", together=False)
    with pytest.raises(ConfigError, match=r"end it in \.json"):
        write([REPORT], tmp_path / "found.csv", together=False)
