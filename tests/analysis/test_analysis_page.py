"""The page and the JSON of an analysis: well-formed, complete, with the numbers of the analysis."""

from __future__ import annotations

import dataclasses
import json
import re
import xml.etree.ElementTree as ET

import analysis_cases as cases
import numpy as np
import pytest

from sparse_lm.analysis.export import as_json, plain
from sparse_lm.analysis.page import render, write_analysis
from sparse_lm.analysis.run import Options, analyze


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    workdir = cases.write_run(tmp_path_factory.mktemp("runs") / "a <run>", {3: 2, 6: 0})
    return analyze(workdir, Options(batches=2, effect_batches=1, shuffles=2), lambda line: None)


def parse(page):
    return ET.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


def words_of(page):
    return " ".join("".join(parse(page).itertext()).split())


def test_the_page_says_what_was_found(found):
    inside = cases.inside(found)
    page = render(found, "python experiments/analyze.py --workdir='a <run>'")
    text = words_of(page)
    for heading in (
        "The experts of a <run>",
        "What experts specialise in",
        "Router saturation",
        "Experts chosen together",
        "Drops by position",
        "Vocabulary of each expert",
        "Without an expert, and with one alone",
    ):
        assert heading in text
    best = max(x.bits for x in inside.specialisation[1].information)
    assert f"{best:.4f}" in text and "grammar000" in text
    assert "python experiments/analyze.py --workdir='a <run>'" in text
    worst = inside.removal.change_NE.max()
    assert f"{worst:+.4f} ±" in text
    assert not re.search(r"\bnan\b", text)
    cells = [cell.text for cell in parse(page).iter("td")]
    assert any(cell == "0, 1" or cell == "2, 3" for cell in cells) and not {"1, 0", "3, 2"} & set(cells)  # once a pair
    assert "Experts in attention" not in text and "Of no domain" not in text
    # 2 layers: four kinds of labels, pairs, and two interventions; then saturation, drops and the legends.
    charts = [svg.get("aria-label", "") for svg in parse(page).iter("{http://www.w3.org/2000/svg}svg")]
    assert sum(", layer " in name for name in charts) == 2 * (4 + 1 + 2)
    assert {"Router saturation over steps", "Dropped assignments by position"} <= set(charts)


def test_what_was_left_out_is_said(found):
    inside = cases.inside(found)

    def words(**changes):
        return words_of(render(dataclasses.replace(found, feed_forward=dataclasses.replace(inside, **changes))))

    assert "Of no domain is it known" in words(specialisation=inside.specialisation[:2])
    assert "Left out." in words(removal=None, forcing=None)
    assert "another fingerprint" in words_of(render(dataclasses.replace(found, expected_data=False)))
    nothing = dataclasses.replace(inside.observed, dropped_NP=np.zeros_like(inside.observed.dropped_NP))
    assert "Nothing was dropped" in words(observed=nothing)
    alone = np.stack([np.diag(np.diag(layer)) for layer in inside.pairs_NEE])
    assert "No token has two experts" in words(pairs_NEE=alone)
    renormalised = dataclasses.replace(found, options=dataclasses.replace(found.options, renormalise=True))
    assert "grow to the same sum" in words_of(render(renormalised))


def test_both_files_are_written(found):
    path = write_analysis(found, "the command")
    assert path == found.workdir / "analysis.html" and path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    stored = json.loads((found.workdir / "analysis.json").read_text())
    assert stored["command"] == "the command" and stored["step"] == 6 and stored["tokens"] > 0


def test_json_holds_the_numbers(found):
    inside = cases.inside(found)
    content = as_json(found)
    domain = content["specialisation"]["domain"]
    assert domain["labels"] == ["grammar000", "grammar001"]
    assert domain["layers"][1]["bits"] == inside.specialisation[1].information[1].bits
    assert set(domain["layers"][0]) == {
        *("bits", "entropy", "shuffled", "highest", "shuffles", "excess", "share", "within_chance")
    }
    np.testing.assert_array_equal(np.sum(domain["counts"], axis=(1, 2)), np.sum(content["load"], axis=1))
    np.testing.assert_allclose(content["removal"]["change"], inside.removal.change_NE)
    assert np.shape(content["forcing"]["change_by_domain"]) == (2, 4, 2)
    assert set(content["removal"]["loss_by_domain"]) == {"grammar000", "grammar001"}
    assert np.shape(content["coactivation"]) == (2, 4, 4)
    np.testing.assert_allclose(np.einsum("nii->ni", np.array(content["coactivation"])), 1.0)
    assert np.shape(content["dropped_by_position"]) == (2, 16) and np.max(content["dropped_by_position"]) <= 1
    assert content["saturation"]["steps"] == [3, 6] and content["saturation"]["share"][1] == [1, 1]
    assert len(content["vocabulary"]) == 2 and len(content["vocabulary"][0]) == 4
    assert content["specialisation"]["language"] == domain and content["attention"] is None
    json.dumps(content, allow_nan=False)


def test_what_is_no_number_is_null():
    assert plain(np.array([[1.0, np.nan], [np.inf, 2.0]])) == [[1.0, None], [None, 2.0]]
    assert plain(float("nan")) is None and plain(np.float32(0.5)) == 0.5
