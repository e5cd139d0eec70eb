"""A finished run: everything that its directory holds, and what it tells."""

from __future__ import annotations

import io
import json

import jax
import numpy as np
import pytest
import tiny
from tensorboard_events import scalars_of

from sparse_lm.config import ConfigError
from sparse_lm.telemetry.rundata import load_run, verdict
from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.config import CheckpointConfig, MeshConfig
from sparse_lm.train.restore import load_model
from sparse_lm.train.session import train


def test_the_directory_is_complete(workdir):
    assert {path.name for path in workdir.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "report.html",
    }
    assert len(list((workdir / "tensorboard").glob("events.out.tfevents.*"))) == 1
    with Checkpoints(workdir / "checkpoints", CheckpointConfig(), read_only=True) as checkpoints:
        assert checkpoints.steps()[-2:] == (8, 12)


def test_the_configuration_counts_parameters(finished, workdir):
    session, _ = finished
    info = json.loads((workdir / "config.json").read_text())
    total = sum(np.size(leaf) for leaf in jax.tree.leaves(session.outcome.model))
    assert info["parameters"]["total"] == total
    assert 0 < info["parameters"]["active"] < total
    assert info["config"]["model"]["vocab_size"] == 8


def test_the_outcome(finished):
    outcome = finished[0].outcome
    assert (outcome.step, outcome.resumed_from, outcome.stopped) == (12, None, False)
    assert {split: row["step"] for split, row in outcome.last.items()} == {"train": 12, "validation": 12}


def test_it_tells_what_happens(finished, workdir):
    _, told = finished
    assert "data (grammar):" in told and "devices: data=8" in told
    assert "step 5: validation loss" in told and "step 12/12 100%" in told
    assert "training loss" in told and "above the best possible" in told
    assert str(workdir / "report.html") in told
    assert "resuming" not in told and "finished" not in told.replace(workdir.name, "")


def test_the_verdict_is_that_of_the_rows(workdir):
    result = verdict(load_run(workdir))
    assert result.train_loss == tiny.rows(workdir)[-1]["loss"]
    assert result.validation_loss == tiny.rows(workdir, "validation")[-1]["loss"]
    assert result.best_loss is not None and result.validation_loss is not None
    assert result.best_loss < result.validation_loss
    assert result.nonfinite_steps == 0


def test_the_report_is_a_page_of_this_run(workdir):
    page = (workdir / "report.html").read_text()
    assert page.startswith("<!doctype html>") or page.lower().startswith("<!doctype html>")
    assert "<svg" in page and f"{tiny.rows(workdir, 'validation')[-1]['loss']:.4f}"[:5] in page


def test_tensorboard_has_the_losses(workdir):
    found = scalars_of(workdir / "tensorboard")
    losses = [value for _, value in sorted(found["train/loss"].items())]
    np.testing.assert_allclose(losses, tiny.losses(workdir), rtol=1e-6)
    assert sorted(found["validation/loss"]) == [5, 10, 12]


def test_the_model_can_be_loaded(finished, workdir):
    loaded = load_model(workdir)
    assert loaded.step == 12 and loaded.experiment == finished[0].experiment
    trained = jax.device_get(finished[0].outcome.model)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded.model), trained)


def test_what_cannot_run_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.batch_size"):
        train(tiny.experiment(train__batch_size=9), tmp_path / "run", io.StringIO())
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        train(tiny.experiment(model__vocab_size=4), tmp_path / "run", io.StringIO())
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):  # known only with the data
        train(tiny.experiment(data__grammar__num_symbols=9, mesh=MeshConfig(model=2)), tmp_path / "run", io.StringIO())
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_directory_is_refused_and_left_alone(workdir):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    with pytest.raises(ConfigError, match=r"config\.seed=1: the run in this workdir has 0"):
        train(tiny.experiment(seed=1), workdir, io.StringIO())
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
