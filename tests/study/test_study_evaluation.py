"""One training evaluated in several ways gives what a training for each evaluation would, and is that run's own."""

from __future__ import annotations

import io
import json

import pytest
import study_cases

from sparse_lm.config import ConfigError
from sparse_lm.study.evaluation import evaluate_run
from sparse_lm.study.plan import Run
from sparse_lm.study.results import gather, to_json
from sparse_lm.study.runner import run_dir, run_one
from sparse_lm.study.study import Variant
from sparse_lm.train.loop import TrainingError
from sparse_lm.train.manifest import CheckpointError

TIGHT = {"model__moe__capacity_factor": 1.0, "model__moe__capacity_factor_eval": 0.5}
ROOMY = {"model__moe__capacity_factor_eval": 4.0}
VARIANTS = {
    "tight": Variant(TIGHT),
    "same": Variant(evaluates="tight"),
    "roomy": Variant(ROOMY, evaluates="tight"),
    "trained_roomy": Variant(TIGHT | ROOMY),
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The plan of a study, its folder, and what two trainings and two evaluations (not the dense one) found."""
    folder = tmp_path_factory.mktemp("study")
    plan = study_cases.plan(1, variants=VARIANTS, claims=())
    words = [run_one(run, folder) for job in plan.jobs[1:] for run in job]
    assert len(words) == 4 and all("validation loss" in one for _, one in words), words
    return plan, folder, gather(plan, folder)


def named(plan, name: str) -> Run:
    """The run of a variant."""
    return next(run for run in plan.runs if run.variant == name)


def test_losses_are_those_of_a_training_for_each_evaluation(done):
    _, _, found = done
    losses = {name: values[0] for name, values in found.values["validation_loss"].items()}
    assert losses["same"] == losses["tight"] and losses["roomy"] == losses["trained_roomy"]
    assert losses["roomy"] != losses["tight"]
    dropped = {name: values[0] for name, values in found.values["dropped_eval"].items()}
    assert dropped["tight"] == dropped["same"] > 0 == dropped["roomy"] == dropped["trained_roomy"]


def test_what_training_took_is_counted_once(done):
    found = done[2]
    for measure in ("seconds", "steps_per_second"):
        assert not {"same", "roomy"} & set(found.values[measure])
    assert found.values["train_loss"]["roomy"] == found.values["train_loss"]["tight"]
    assert found.measured["roomy"][0].curve.steps == (4,) and found.measured["tight"][0].curve.steps == (2, 4)
    data = to_json(found)
    assert data["runs"] == {"finished": 4, "failed": 0, "started": 0, "waiting": 1}
    assert data["variants"]["roomy"]["parameters"] == data["variants"]["tight"]["parameters"]
    assert data["variants"]["roomy"]["evaluates"] == "tight" and data["variants"]["tight"]["evaluates"] is None
    assert data["variants"]["roomy"]["recorded"] == data["variants"]["tight"]["recorded"]
    assert set(found.values["seconds"]) == {"tight", "trained_roomy"}


def test_its_directory_says_what_was_evaluated_and_how(done):
    plan, folder, _ = done
    here = run_dir(folder, named(plan, "roomy"))
    info = json.loads((here / "config.json").read_text())
    assert info["evaluates"] == named(plan, "tight").name
    assert info["config"]["model"]["moe"]["capacity_factor_eval"] == 4.0
    assert not (here / "checkpoints").exists() and (here / "done.json").exists()
    rows = [json.loads(line) for line in (here / "metrics.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows].count("validation") == 1 and rows[-1]["step"] == 4
    assert "at step 4: validation loss" in (here / "train.log").read_text()


def test_a_training_that_has_not_begun(done, tmp_path):
    plan, _, _ = done
    with pytest.raises(TrainingError, match=f"{named(plan, 'tight').name} has not begun"):
        evaluate_run(named(plan, "roomy"), tmp_path, tmp_path / "new", io.StringIO())


def test_another_training_is_refused(done, tmp_path):
    plan, folder, _ = done
    with pytest.raises(ConfigError, match=r"model\.moe\.capacity_factor_eval"):
        evaluate_run(named(plan, "roomy"), run_dir(folder, named(plan, "trained_roomy")), tmp_path, io.StringIO())


def test_a_training_without_its_checkpoint(done, tmp_path):
    plan, folder, _ = done
    (tmp_path / "trained").mkdir()
    source = run_dir(folder, named(plan, "tight")) / "config.json"
    (tmp_path / "trained" / "config.json").write_text(source.read_text())
    with pytest.raises(CheckpointError):
        evaluate_run(named(plan, "roomy"), tmp_path / "trained", tmp_path / "new", io.StringIO())
