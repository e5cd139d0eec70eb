"""Runs side by side: what is drawn, what is named, and that it holds the numbers of the rows."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from telemetry_fake_run import train_rows, validation_rows, write_run

from sparse_lm.telemetry.compare import compare_losses
from sparse_lm.telemetry.rundata import RunData, load_run

NS = "{http://www.w3.org/2000/svg}"


def run_of(path, train=(), validation=()) -> RunData:
    path.mkdir()
    return load_run(write_run(path, list(train), list(validation), 100))


def paths(figure) -> dict[str, ET.Element]:
    return {path.get("data-name", ""): path for path in ET.fromstring(figure.svg).iter(f"{NS}path")}


def words(figure) -> set[str | None]:
    return {text.text for text in ET.fromstring(figure.svg).iter(f"{NS}text")}


def test_each_run_has_a_colour_and_both_its_losses(tmp_path):
    rows = train_rows(100, 0, 0), validation_rows(100, 20)
    found = paths(compare_losses({"sparse": run_of(tmp_path / "a", *rows), "dense": run_of(tmp_path / "b", *rows)}))
    assert list(found) == ["sparse, train", "sparse, validation", "dense, train", "dense, validation"]
    colors = {name: path.get("stroke") for name, path in found.items()}
    assert colors["sparse, train"] == colors["sparse, validation"] != colors["dense, train"]
    assert [path.get("stroke-dasharray") for path in found.values()] == ["2 3", None, "2 3", None]


def test_the_last_validation_losses_are_told(tmp_path):
    first, second = validation_rows(100, 20), validation_rows(100, 20)
    first[-1]["loss"], second[-1]["loss"] = 1.25, 2.5
    figure = compare_losses({"a": run_of(tmp_path / "a", (), first), "b": run_of(tmp_path / "b", (), second)})
    assert figure.caption.endswith("Last validation: a 1.250, b 2.500.")


def test_a_bound_is_drawn_where_all_runs_have_the_same(tmp_path):
    known, unknown = validation_rows(10, 5), validation_rows(10, 5, best=None)
    one, same = run_of(tmp_path / "a", (), known), run_of(tmp_path / "b", (), known)
    assert "best possible" in words(compare_losses({"a": one, "b": same}))
    assert "best possible" not in words(compare_losses({"a": one, "b": run_of(tmp_path / "c", (), unknown)}))


def test_the_axis_reaches_the_longest_run_and_one_run_may_lack_a_split(tmp_path):
    short, long = run_of(tmp_path / "a", train_rows(10, 0, 0)), run_of(tmp_path / "b", (), validation_rows(200, 100))
    figure = compare_losses({"short": short, "long": long})
    assert list(paths(figure)) == ["short, train", "long, validation"]
    assert ET.fromstring(figure.svg).get("data-x") == "0 200 0"
    assert "short" not in figure.caption


def test_runs_without_a_loss_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"\['early'\] have logged none"):
        compare_losses({"early": run_of(tmp_path / "a")})


def test_more_runs_than_colours_are_drawn(tmp_path):
    run = run_of(tmp_path / "a", (), validation_rows(10, 5))
    assert len(paths(compare_losses({str(i): run for i in range(11)}))) == 11
