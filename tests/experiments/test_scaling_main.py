"""The command line of scaling laws: a published law, a fit to a CSV, a ladder, and mistakes in one line."""

from __future__ import annotations

import json

import mains
import numpy as np
import pytest

from sparse_lm.scaling.published import CHINCHILLA


@pytest.fixture
def points(tmp_path):
    """A CSV of the law of Hoffmann et al."""
    n, d = (one.ravel() for one in np.meshgrid(np.geomspace(1e8, 1e10, 4), np.geomspace(1e9, 1e11, 4)))
    rows = [f"{a},{b},{loss}" for a, b, loss in zip(n, d, CHINCHILLA.loss(active=n, tokens=d), strict=True)]
    file = tmp_path / "points.csv"
    file.write_text("active,tokens,loss\n" + "\n".join(rows) + "\n")
    return file


def test_a_published_law_and_its_best_sizes(tmp_path):
    out = tmp_path / "out"
    status, text, errors = mains.call(
        "scaling", "--law=joint", f"--workdir={out}", "--budgets=1e20,1e22", "--experts=32"
    )
    assert status == 0, errors
    values = json.loads((out / "fit.json").read_text())
    assert [one["flops"] for one in values["optima"]] == [1e20, 1e22]
    assert values["optima"][0]["size"] == pytest.approx(669e6, rel=0.02)  # table 1 of the paper
    assert "Ludziejewski et al. 2025" in text and "674M" in text
    assert values["command"].startswith("python experiments/scaling.py --law=joint --workdir=")
    assert (out / "report.html").is_file()


def test_a_fit_to_a_csv(points, tmp_path):
    status, text, errors = mains.call(
        "scaling", "--law=chinchilla", f"--points={points}", f"--workdir={tmp_path / 'out'}", "--resamples=10"
    )
    assert status == 0, errors
    values = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert values["coefficients"] == pytest.approx(CHINCHILLA.values(), rel=1e-6)
    assert values["fit"]["points"] == 16 and "16 points" in text


def test_lists():
    status, text, _ = mains.call("scaling", "--list")
    assert status == 0 and "granularity" in text and "Clark et al. 2022" in text
    status, text, _ = mains.call("scaling", "--ladder=configs/ladder.py")
    assert status == 0 and "--config.model.moe.num_experts=8" in text and "left out" in text


def test_mistakes_are_one_line(points):
    cases = [
        ((), "config.law=None: is needed; known: chinchilla"),
        (("--law=joint", "--budgets=many"), "config.budgets=['many']: expected numbers"),
        (("--law=joint", f"--points={points}"), "no column 'experts', which the law joint needs"),
    ]
    for arguments, message in cases:
        status, _, errors = mains.call("scaling", *arguments)
        assert status == 2 and message in errors and errors.count("\n") == 1, errors
