"""Figures of a whole run: which there are, what they name, and that they hold the numbers of the rows."""

# An element or attribute that is missing fails the test by itself.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false

import xml.etree.ElementTree as ET

import pytest
from telemetry_fake_run import DOMAINS, train_rows, validation_rows, write_run

from sparse_lm.telemetry import figures
from sparse_lm.telemetry.rundata import load_run, verdict

NS = "{http://www.w3.org/2000/svg}"


def run_of(tmp_path, train=(), validation=(), steps=100):
    return load_run(write_run(tmp_path, list(train), list(validation), steps))


def names(figure):
    return [path.get("data-name") for path in ET.fromstring(figure.svg).iter(f"{NS}path")]


def words(figure):
    return [text.text for text in ET.fromstring(figure.svg).iter(f"{NS}text")]


def test_the_loss_figure_has_training_validation_and_the_best_possible(tmp_path):
    run = run_of(tmp_path, train_rows(100, 0, 0), validation_rows(100, 20))
    figure = figures.losses(run, verdict(run))
    assert names(figure) == ["train (each row)", "train (running mean)", "validation"]
    assert {"best possible", "nats / token", "step"} <= set(words(figure))
    assert "2.000 nats" in figure.caption


def test_without_a_known_entropy_there_is_no_best_possible(tmp_path):
    run = run_of(tmp_path, train_rows(10, 0, 0), validation_rows(10, 5, best=None))
    figure = figures.losses(run, verdict(run))
    assert "best possible" not in words(figure)
    assert names(figure) == ["train", "validation"]


def test_no_rows_make_no_figures(tmp_path):
    run = run_of(tmp_path)
    assert figures.losses(run, verdict(run)) is None
    assert figures.domains(run) is None
    assert figures.optimization(run) == []
    assert figures.present(lambda: None, lambda: None) == []


def test_few_rows_are_dots_and_many_are_smoothed(tmp_path):
    few = figures.raw_and_smooth(run_of(tmp_path / "few", train_rows(40, 0, 0)), "loss", "train")
    assert [(s.markers, s.faint, len(s.x)) for s in few] == [(True, False, 40)]
    many = figures.raw_and_smooth(run_of(tmp_path / "many", train_rows(5000, 0, 0)), "loss", "train")
    assert [(s.markers, s.faint) for s in many] == [(False, True), (False, False)]
    assert all(len(s.x) <= figures.POINTS + 2 for s in many)


def test_a_factor_scales_values_and_keeps_nulls(tmp_path):
    run = run_of(tmp_path, [{"step": 1, "mfu": 0.25}, {"step": 2, "mfu": None}])
    (series,) = figures.raw_and_smooth(run, "mfu", "utilisation", 100.0)
    assert series.y == [25.0, None]


@pytest.mark.parametrize(("first", "last", "low"), [(1, 100, 0), (5, 100, 0), (6, 100, 6), (1, 3, 1), (900, 1000, 900)])
def test_the_step_axis_starts_at_0_unless_that_wastes_room(tmp_path, first, last, low):
    axis = figures.step_axis(run_of(tmp_path, [{"step": first}, {"step": last}]))
    assert (axis.low, axis.high, axis.label) == (low, last, "step")


def test_domains_come_hardest_first(tmp_path):
    run = run_of(tmp_path, [], validation_rows(100, 20))
    assert figures.domain_names(run) == list(reversed(DOMAINS))
    assert names(figures.domains(run)) == list(reversed(DOMAINS))


def test_of_many_domains_the_hardest_are_drawn_and_the_caption_says_so(tmp_path):
    run = run_of(tmp_path, [], validation_rows(100, 50, [f"d{i:02}" for i in range(20)]))
    figure = figures.domains(run)
    assert names(figure) == [f"d{i:02}" for i in range(19, 11, -1)]
    assert "The 8 hardest of 20 domains" in figure.caption


def test_a_domain_that_is_missing_or_null_in_a_row_leaves_a_gap(tmp_path):
    rows = [
        {"step": 1, "split": "validation", "losses_by_domain": {"a": None}},
        {"step": 2, "split": "validation"},
        {"step": 3, "split": "validation", "losses_by_domain": {"a": 1.0, "b": 2.0}},
    ]
    figure = figures.domains(run_of(tmp_path, [], rows))
    assert names(figure) == ["b", "a"]


def test_optimization_shows_what_the_rows_have(tmp_path):
    shown = figures.optimization(run_of(tmp_path / "all", train_rows(100, 0, 0)))
    headings = [figure.heading for figure in shown]
    assert headings == ["Learning rate", "Gradient norm", "Throughput", "Model FLOPs utilisation"]
    assert names(shown[0]) == ["learning rate"]  # a schedule has no noise to smooth
    assert "3e-4" in words(shown[0])
    assert "tokens / s" in words(shown[2])
    without = [{**row, "mfu": None} for row in train_rows(10, 0, 0)]
    assert [f.heading for f in figures.optimization(run_of(tmp_path / "none", without))][-1] == "Throughput"


def test_the_gradient_norm_is_logarithmic(tmp_path):
    norm = figures.optimization(run_of(tmp_path, train_rows(100, 0, 0)))[1]
    assert ET.fromstring(norm.svg).get("data-y").endswith(" 1")
