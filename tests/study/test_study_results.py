"""Results: what is gathered, and how it stands in results.json and table.md."""

from __future__ import annotations

import json

import pytest
import study_cases

from sparse_lm.study.plan import make_plan
from sparse_lm.study.results import claim_rows, gather, plus_minus, power_sentence, to_json, to_markdown, write_results
from sparse_lm.study.runner import run_dir
from sparse_lm.study.stats import Summary
from sparse_lm.study.study import SCALES, Scale

LOSSES = {"dense": (2.0, 2.2, 2.1), "four": (1.0, 1.1, 1.2), "two": (1.5, 1.4, 1.6)}


def pretended(directory, plan, leave_out=()):
    for run in plan.runs:
        if run.name not in leave_out:
            study_cases.pretend(directory, run, LOSSES[run.variant][run.seed])
    return gather(plan, directory, "python experiments/ablate.py")


def test_json_by_hand(tmp_path):
    found = to_json(pretended(tmp_path, study_cases.plan(3)))
    assert found["complete"] and found["runs"] == {"finished": 9, "failed": 0, "started": 0, "waiting": 0}
    assert (found["study"], found["scale"], found["budget"], found["devices"]) == ("tiny", "toy", "steps", ["abacus"])
    four = found["variants"]["four"]
    assert (four["mean"], four["n"], four["paper"]) == (pytest.approx(1.1), 3, 1.5)
    assert four["standard_error"] == pytest.approx(0.1 / 3**0.5)
    assert four["recorded"] == {"parameters": 100, "active": 50, "flops_per_token": 600}
    assert four["measures"]["dead_experts"]["values"] == {"0": 1.0, "1": 1.0, "2": 1.0}
    assert found["variants"]["two"]["changes"] == {"model__moe__num_experts": 2}
    helps, same = found["claims"]
    assert (helps["name"], helps["verdict"], same["verdict"]) == ("helps", "shown", "shown")
    (one,) = helps["comparisons"]
    assert one["differences"] == pytest.approx([-1.0, -1.1, -0.9])
    assert one["bootstrap_interval"] == pytest.approx([-1.1, -0.9]) and one["luck"] == 0.125
    assert found["training_seconds"] == 90.0
    json.dumps(found, allow_nan=False)


def test_power_is_the_median_over_variants(tmp_path):
    found = pretended(tmp_path, study_cases.plan(3))
    # Differences to dense: four -1, -1.1, -0.9 (deviation 0.1); two -0.5, -0.8, -0.5 (deviation 0.1732).
    factor = (4.302653 + 1.060660) / 3**0.5
    assert found.detectable() == pytest.approx(factor * (0.1 + 0.173205) / 2, abs=1e-4)
    assert "0.4230 nats / token would be found in 80%" in power_sentence(found)


def test_half_done(tmp_path):
    plan = study_cases.plan(3)
    left = [run.name for run in plan.runs if run.seed > 0]
    found = pretended(tmp_path, plan, leave_out=left)
    assert not found.complete and found.detectable() is None
    data = to_json(found)
    assert data["runs"]["waiting"] == 6 and data["claims"][0]["verdict"] == "not shown"
    assert data["variants"]["four"]["standard_error"] is None
    assert "not known before two seeds" in to_markdown(found) and "3 of 9 runs finished" in to_markdown(found)


def test_nothing_done(tmp_path):
    found = gather(study_cases.plan(), tmp_path)
    assert to_json(found)["variants"]["four"]["n"] == 0 and "| four | - | 0 | 1.5 |" in to_markdown(found)


def test_failures_are_named(tmp_path):
    plan = study_cases.plan(3)
    bad = plan.runs[4]
    pretended(tmp_path, plan, leave_out=[bad.name])
    run_dir(tmp_path, bad).mkdir(parents=True)
    (run_dir(tmp_path, bad) / "failure.json").write_text('{"error": "TrainingError: lost"}')
    found = gather(plan, tmp_path)
    assert found.complete and to_json(found)["failures"] == {bad.name: "TrainingError: lost"}
    assert f"- {bad.name}: TrainingError: lost" in to_markdown(found)
    assert to_json(found)["variants"]["four"]["n"] == 2


def test_the_tables(tmp_path):
    found = pretended(tmp_path, study_cases.plan(3))
    words = to_markdown(found)
    assert "| four | 1.1000 ± 0.0577 | 3 | 1.5 |" in words
    assert "A paper, arXiv 0000.00000, table 1" in words
    head, rows = claim_rows(found)
    assert len({len(row) for row in (head, *rows)}) == 1
    assert rows[0][:3] == ["helps", "Experts help.", "shown"]
    assert rows[0][3:6] == ["four - dense < 0", "-1.0000 ± 0.0577", "-1.1000 to -0.9000"] and rows[0][7] == "12.5 %"


def test_equal_time_reads_all_at_the_time_of_the_first(tmp_path):
    base = study_cases.study().scales["toy"].base.replace(optim__schedule="constant")
    study = study_cases.study(budget="time", scales=dict.fromkeys(SCALES, Scale(base, 2)))
    plan = make_plan(study, "toy")
    for run in plan.runs:
        study_cases.pretend(
            tmp_path, run, LOSSES[run.variant][run.seed], seconds=20.0 if run.variant == "four" else 10.0
        )
    found = gather(plan, tmp_path)
    # At 10 seconds `four` is at its first evaluation, 1 above its last.
    assert found.values["loss_at_equal_time"]["four"] == pytest.approx({0: 2.0, 1: 2.1})
    assert found.values["loss_at_equal_time"]["two"] == pytest.approx({0: 1.5, 1: 1.4})
    assert to_json(found)["measure"] == "loss_at_equal_time"


def test_files(tmp_path):
    found = pretended(tmp_path, study_cases.plan(3))
    write_results(found, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == to_json(found)
    assert (tmp_path / "table.md").read_text() == to_markdown(found)


def test_plus_minus():
    assert plus_minus(None, 2) == "-"
    assert plus_minus(Summary(1.236, None, 1), 2) == "1.24"
    assert plus_minus(Summary(1.236, 0.011, 3), 2) == "1.24 ± 0.01"
