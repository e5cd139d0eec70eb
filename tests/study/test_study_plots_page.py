"""Plots and the page: well-formed, complete, and honest about what is missing."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
import study_cases

from sparse_lm.study.measures import Curve
from sparse_lm.study.page import render, write_page
from sparse_lm.study.plots import DotRow, by_variant, claim_plot, curves, dot_plot, figures, mean_curve
from sparse_lm.study.results import gather
from sparse_lm.study.study import Variant
from sparse_lm.telemetry.axes import Axis

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def results(tmp_path):
    """A finished study of two seeds in which four experts help and failures do not occur."""
    plan = study_cases.plan(2, notes="Mind the <gap>.")
    for run in plan.runs:
        loss = {"dense": 2.0, "four": 1.0, "two": 1.5}[run.variant] + 0.1 * run.seed
        study_cases.pretend(tmp_path, run, loss)
    return gather(plan, tmp_path, "python experiments/ablate.py --study=x")


def test_a_dot_plot_places_values():
    svg = dot_plot(
        [DotRow("a", [1.0, 3.0], 2.0, 1.5, 2.5), DotRow("b", [], None, None, None)], Axis("x", 0, 4), "t", 0.0
    )
    tree = ET.fromstring(svg)
    big = [c for c in tree.iter(f"{SVG}circle") if c.get("r") == "4.4"]
    small = sorted(float(c.get("cx", 0)) for c in tree.iter(f"{SVG}circle") if c.get("r") == "2.6")
    assert len(big) == 1 and float(big[0].get("cx", 0)) == pytest.approx(sum(small) / 2, abs=0.2)
    bar = next(line for line in tree.iter(f"{SVG}line") if line.get("stroke-width") == "3")
    quarter = (small[1] - small[0]) / 4
    assert float(bar.get("x1", 0)) == pytest.approx(small[0] + quarter, abs=0.2)
    assert [t.text for t in tree.iter(f"{SVG}text")][-2:] == ["a", "b"]


def test_a_dot_plot_needs_rows_and_shortens_long_names():
    with pytest.raises(ValueError, match="no rows"):
        dot_plot([], Axis("x"), "t")
    assert "x" * 29 + "…" in dot_plot([DotRow("x" * 60, [1.0], 1.0, 1.0, 1.0)], Axis("x"), "t")


def test_figures_cover_measures_claims_and_curves(results):
    headings = [figure.heading for figure in figures(results)]
    assert headings[:3] == ["Validation loss", "Claims about the validation loss", "Validation loss over steps"]
    assert {"MaxVio", "Dropped in training", "Dead experts", "Speed"} <= set(headings)
    for figure in figures(results):
        ET.fromstring(figure.svg)
    assert by_variant(results, "entropy_gap") is None


def test_verdicts_differ_in_form(results):
    drawn = claim_plot(results)[0].svg
    names = [t.text for t in ET.fromstring(drawn).iter(f"{SVG}text")]
    assert "four - dense" in names and 'r="4.4" fill="#009e73"' in drawn  # shown
    rows = [DotRow(mark, [1.0], 1.0, 0.5, 2.0, "#000", mark) for mark in ("dot", "square", "ring")]
    tree = ET.fromstring(dot_plot(rows, Axis("x"), "t"))
    big = [one for one in tree.iter() if one.tag == f"{SVG}rect" or one.get("r") == "4.4"]
    assert [(one.tag.removeprefix(SVG), one.get("fill")) for one in big] == [
        ("circle", "#000"),
        ("rect", "#000"),
        ("circle", "#fff"),
    ]


def test_an_axis_of_zeros_starts_there(tmp_path):
    plan = study_cases.plan(2)
    for run in plan.runs:
        study_cases.pretend(tmp_path, run, 1.0, dropped_fraction=0.0)
    figure = by_variant(gather(plan, tmp_path), "dropped")
    assert figure is not None
    ticks = [t.text for t in ET.fromstring(figure.svg).iter(f"{SVG}text") if t.get("text-anchor") == "middle"]
    assert ticks[0] == "0" and not any(str(tick).startswith("-") for tick in ticks)


def test_learning_curves_are_told_apart_and_of_trainings_only(tmp_path):
    many = {f"v{i}": Variant({"model__moe__expert_dropout": i / 100}) for i in range(10)}
    plan = study_cases.plan(1, variants=many | {"again": Variant(evaluates="v1")}, claims=())
    for run in plan.runs:
        study_cases.pretend(tmp_path, run, 1.0)
    figure = curves(gather(plan, tmp_path))
    assert figure is not None
    lines = [one for one in ET.fromstring(figure.svg).iter(f"{SVG}path") if one.get("class") == "series"]
    assert [one.get("data-name") for one in lines] == ["dense", *many]
    assert len({(one.get("stroke"), one.get("stroke-dasharray")) for one in lines}) == 11


def test_nothing_to_draw(tmp_path):
    empty = gather(study_cases.plan(), tmp_path)
    assert figures(empty) == [] and curves(empty) is None and claim_plot(empty) == []
    ET.fromstring(render(empty).removeprefix("<!DOCTYPE html>\n"))


def test_mean_curve_takes_common_steps():
    steps, losses = mean_curve([Curve((1, 2, 3), (1, 2, 3), (3.0, 2.0, 1.0)), Curve((2, 3), (2, 3), (4.0, 2.0))])
    assert (steps, losses) == ([2, 3], [3.0, 1.5])


def test_the_page(results, tmp_path):
    path = write_page(results, tmp_path)
    words = path.read_text()
    ET.fromstring(words.removeprefix("<!DOCTYPE html>\n"))
    for part in (
        "Does it run?",
        "A paper",
        "Experts help.",
        "shown",
        "Power: ",
        "luck",
        "Mind the &lt;gap&gt;",
        "--study=x",
    ):
        assert part in words
    plots = sorted(file.name for file in (tmp_path / "plots").iterdir())
    assert "validation_loss.svg" in plots and "claims_about_the_validation_loss.svg" in plots
    ET.fromstring((tmp_path / "plots" / "validation_loss.svg").read_text())


def test_the_page_names_failures(tmp_path):
    plan = study_cases.plan(1)
    folder = tmp_path / "runs" / plan.runs[1].name
    folder.mkdir(parents=True)
    (folder / "failure.json").write_text('{"error": "TrainingError: <lost>"}')
    words = render(gather(plan, tmp_path))
    assert "TrainingError: &lt;lost&gt;" in words and "flatters" in words
