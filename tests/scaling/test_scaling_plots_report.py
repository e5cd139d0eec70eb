"""Plots and reports: what is drawn is what the law says, and the page and its JSON hold it."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from scaling_cases import GRIDS

from sparse_lm.config import ConfigError
from sparse_lm.scaling.fit import FitOptions, fit
from sparse_lm.scaling.laws import Chinchilla
from sparse_lm.scaling.optimum import optimum
from sparse_lm.scaling.plots import MOST_GROUPS, agreement, figures, fitted_lines, iso_flops, optima, optimal_losses
from sparse_lm.scaling.points import Points, drawn
from sparse_lm.scaling.published import CHINCHILLA, GRANULARITY, JOINT, LAWS, PUBLISHED, UNIFIED_S_BASE
from sparse_lm.scaling.report import budgets_of, make_report, render, summary, to_json, write_report


@pytest.fixture(scope="module")
def chinchilla():
    points = drawn(CHINCHILLA, GRIDS["chinchilla"], noise=0.002)
    return fit(Chinchilla, points, FitOptions(starts=50, descents=3, resamples=10)), points


def names(svg: str) -> list[str]:
    """The lines of a chart, which is well-formed XML."""
    root = ElementTree.fromstring(svg)
    return [str(one.get("data-name")) for one in root.iter() if one.get("class") == "series"]


def circles(svg: str) -> int:
    return sum(one.tag.endswith("circle") for one in ElementTree.fromstring(svg).iter())


def test_curves_of_equal_flops_and_their_optima():
    figure = iso_flops(JOINT, (1e22, 1e20, 1e21), {"experts": 8.0})
    assert names(figure.svg) == ["1e+20 FLOPs", "1e+21 FLOPs", "1e+22 FLOPs", "compute-optimal"]
    assert circles(figure.svg) == 3 and "At experts 8" in figure.caption
    assert "data-kind" not in figure.svg and "parameters that a token uses (log)" in figure.svg


def test_optimal_losses_have_a_line_for_each_choice():
    figure = optimal_losses(JOINT, (1e20, 1e22), {"experts": 8.0}, "experts")
    assert names(figure.svg) == [f"experts {value}" for value in (1, 2, 4, 8, 16, 32)]


def test_fitted_lines_pass_through_their_points(chinchilla):
    figure = fitted_lines(*chinchilla)
    # Seven sizes, a line and its dots for each.
    assert len(names(figure.svg)) == 2 * 7 and circles(figure.svg) == 49
    assert "of 7 groups" not in figure.caption


def test_of_many_groups_some_are_shown():
    points = drawn(JOINT, GRIDS["joint"])
    found = fit(LAWS["joint"], points, FitOptions(starts=50, descents=2, resamples=0))
    figure = fitted_lines(found, points)
    assert circles(figure.svg) == 4 * MOST_GROUPS and f"{MOST_GROUPS} of 32 groups are shown" in figure.caption


def test_agreement_has_a_dot_for_every_point(chinchilla):
    figure = agreement(*chinchilla)
    assert names(figure.svg) == ["equal", "points"] and circles(figure.svg) == 49


def test_a_law_without_tokens_has_no_budgets():
    assert figures(UNIFIED_S_BASE, (), {}, None) == [] and optima(UNIFIED_S_BASE, (1e20,), {}) == []
    points = drawn(UNIFIED_S_BASE, GRIDS["unified"])
    found = fit(LAWS["unified"], points, FitOptions(starts=50, descents=2, resamples=0))
    shown = figures(found.law, (), {}, (found, points))
    assert [figure.heading for figure in shown] == ["Points and fit", "Fitted over measured loss"]
    report = make_report(found.law, (found, points))
    assert report.optima == () and "compute-optimal" not in summary(report)
    with pytest.raises(ConfigError, match=r"sparsity=0\.5: the law unified does not depend on it"):
        make_report(UNIFIED_S_BASE, fixed={"sparsity": 0.5})


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_laws_have_a_page(name):
    law = PUBLISHED[name]
    html = render(make_report(law))
    ElementTree.fromstring(html.removeprefix("<!DOCTYPE html>\n"))
    assert law.source in html and all(f">{one}<" in html for one in law.values())
    assert ("Compute-optimal sizes" in html) == ("tokens" in law.columns)


def test_the_best_granularity_is_chosen_unless_it_is_given():
    free = make_report(GRANULARITY, budgets=(1.93e20, 6.46e21))
    assert [one.fixed["granularity"] for one in free.optima] == [16, 32]
    given = make_report(GRANULARITY, budgets=(1e20,), fixed={"granularity": 4.0, "experts": 16.0})
    assert given.optima[0] == optimum(GRANULARITY, 1e20, granularity=4.0, experts=16.0)


def test_budgets_span_the_points_and_go_ten_times_beyond(chinchilla):
    fitted, points = chinchilla
    spent = 6 * points.columns["active"] * points.columns["tokens"]
    low, middle, high, beyond = budgets_of(fitted.law, points, {})
    assert (low, high, beyond) == (spent.min(), spent.max(), 10 * spent.max())
    assert middle == pytest.approx(np.sqrt(low * high))
    assert make_report(fitted.law, chinchilla).budgets == (low, middle, high, beyond)


def test_other_columns_are_the_median_of_the_points():
    points = drawn(JOINT, GRIDS["joint"])
    found = fit(LAWS["joint"], points, FitOptions(starts=50, descents=2, resamples=0))
    assert make_report(found.law, (found, points)).fixed == {"experts": 16.0}
    assert make_report(found.law, (found, points), fixed={"experts": 2.0}).fixed == {"experts": 2.0}


def test_intervals_of_optima_hold_the_optimum(chinchilla):
    report = make_report(chinchilla[0].law, chinchilla, (1e21,))
    ((size, tokens),) = [one for one in report.intervals if one is not None]
    assert size[0] < report.optima[0].size * 1.05 and report.optima[0].size * 0.95 < size[1]
    assert tokens[0] < tokens[1] and size[0] < size[1]
    without = dataclasses.replace(chinchilla[0], resamples=(), intervals={})
    assert make_report(without.law, (without, chinchilla[1]), (1e21,)).intervals == (None,)


def test_a_report_on_disk(chinchilla, tmp_path):
    report = make_report(chinchilla[0].law, chinchilla, (1e21, 1e22), command="python experiments/scaling.py --x")
    page = write_report(report, tmp_path / "out")
    html = page.read_text()
    ElementTree.fromstring(html.removeprefix("<!DOCTYPE html>\n"))
    assert "python experiments/scaling.py --x" in html and "3 / 3" in html
    assert {path.name for path in (tmp_path / "out" / "plots").iterdir()} == {
        "curves_of_equal_flops.svg",
        "fitted_over_measured_loss.svg",
        "points_and_fit.svg",
    }
    values = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert values["coefficients"] == report.law.values() and len(values["points"]) == 49
    assert values["optima"][1]["flops"] == 1e22 and len(values["optima"][1]["size_interval"]) == 2
    low, high = values["fit"]["intervals"]["alpha"]
    assert low < high and values["fit"]["resamples"] == 10 and values["law"] == "chinchilla"
    row = values["points"][5]
    expected = report.law.loss(active=row["active"], tokens=row["tokens"])
    assert row["fitted"] == pytest.approx(float(expected))


def test_a_summary_has_the_published_value_beside_the_fitted_one(chinchilla):
    text = summary(make_report(chinchilla[0].law, chinchilla, (1e21,)))
    assert "49 points" in text and "3 of 3 descents end in the same minimum" in text
    (row,) = [line for line in text.splitlines() if line.startswith("alpha ")]
    assert row.endswith(" 0.34") and " to " in row
    assert to_json(make_report(CHINCHILLA))["optima"][0]["size_interval"] is None


def test_a_report_says_what_is_not_determined(chinchilla):
    bounded = dataclasses.replace(chinchilla[0], at_bounds=("e", "beta"))
    for text in (
        summary(make_report(bounded.law, (bounded, chinchilla[1]))),
        render(make_report(bounded.law, (bounded, chinchilla[1]))),
    ):
        assert "t a bound of the fit, and not determined by these points: e, beta; measure more points" in text
    assert "not determined by" not in summary(make_report(chinchilla[0].law, chinchilla))


def test_a_report_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another directory"):
        write_report(make_report(CHINCHILLA), tmp_path / "file")


def test_labels_of_points_are_kept(chinchilla):
    fitted, points = chinchilla
    labelled = Points(points.columns, points.loss, "x", tuple(f"run{i}" for i in range(points.count)))
    assert to_json(make_report(fitted.law, (fitted, labelled), (1e21,)))["points"][7]["label"] == "run7"
    assert to_json(make_report(fitted.law, (fitted, points), (1e21,)))["points"][7]["label"] == "8"
