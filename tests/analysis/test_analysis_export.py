"""JSON of an analysis without interventions, and of experts that are called by name."""

from __future__ import annotations

import json

import analysis_cases as cases

from sparse_lm.analysis.export import as_json
from sparse_lm.analysis.page import render
from sparse_lm.analysis.run import Options, analyze


def test_what_was_left_out_is_null(tmp_path):
    cases.write_run(tmp_path / "a", {1: 0}, model__moe__num_zero=1, model__moe__top_k=1)
    found = analyze(tmp_path / "a", Options(batches=1, effect_batches=0, shuffles=1), lambda line: None)
    content = as_json(found, "command")
    assert content["removal"] is None and content["forcing"] is None
    assert content["experts"] == ["0", "1", "2", "3", "zero 0"] and content["options"]["effect_batches"] == 0
    assert content["saturation"] == {"steps": [1], "share": [[1.0, 1.0]], "unrelated": 0.2}
    assert content["data_of_the_run"] is True and content["workdir"] == str(tmp_path / "a")
    words = json.loads(json.dumps(content, allow_nan=False))["vocabulary"][0]
    assert len(words) == 5 and sum(expert["assignments"] for expert in words) == len(found.tokens.id_M)
    assert "No token has two experts" in render(found) and "Left out." in render(found)
    assert "no other checkpoint" in render(found)
