"""The command line of the analysis: from a run to its page, and mistakes in one line."""

from __future__ import annotations

import json

import analysis_cases as cases
import mains
import pytest


def test_a_page_beside_the_run(tmp_path):
    cases.write_run(tmp_path / "a", {1: 3, 2: 0})
    options = ["--batches=1", "--effect_batches=1", "--shuffles=2", "--renormalise", "--step=1"]
    options += ["--languages=grammar001=Klingon"]
    status, out, errors = mains.call("analyze", f"--workdir={tmp_path / 'a'}", *options)
    assert status == 0, errors
    assert "compared: 1, 2" in out and "results in" in out and "analysis.html" in out
    stored = json.loads((tmp_path / "a" / "analysis.json").read_text())
    given = {"batches": 1, "effect_batches": 1, "renormalise": True, "shuffles": 2, "step": 1, "best": False}
    assert stored["options"] == given | {"languages": {"grammar001": "Klingon"}}
    assert stored["specialisation"]["language"]["labels"] == ["Klingon", "grammar000"]
    assert stored["step"] == 1 and stored["command"].startswith("python experiments/analyze.py --workdir=")
    domain = max(stored["specialisation"]["domain"]["layers"], key=lambda layer: layer["excess"])
    (line,) = [line for line in out.splitlines() if line.startswith("domain ")]
    assert f"{domain['bits']:.4f} of" in line
    assert (tmp_path / "a" / "analysis.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("seeds", "changes", "arguments", "words"),
    [
        ({}, {"model__moe": None}, [], "model.moe=None is"),
        ({}, {}, ["--best", "--step=1"], "step=1"),
        ({1: 0}, {}, ["--step=7"], "no such step"),
        ({}, {}, ["--languages=grammar001="], "languages='grammar001='"),
        (None, {}, [], "holds no run"),
    ],
    ids=["dense", "both", "absent", "language", "empty"],
)
def test_a_mistake_is_one_line(tmp_path, seeds, changes, arguments, words):
    if seeds is not None:
        cases.write_run(tmp_path, seeds, **changes)
    status, _, errors = mains.call("analyze", f"--workdir={tmp_path}", *arguments)
    assert status == 2 and "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert words.removesuffix(" is") in line
    assert not list(tmp_path.glob("analysis.*"))
