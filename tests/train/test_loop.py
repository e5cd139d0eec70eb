"""The training loop: rows, checkpoints and evaluations in time; resuming, stopping, other meshes; lost steps."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
import tiny
from tensorboard_events import scalars_of

from sparse_lm.moe.stats import unaccounted
from sparse_lm.telemetry.sinks import TensorBoardSink
from sparse_lm.train import hosts
from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.config import CheckpointConfig, MeshConfig
from sparse_lm.train.loop import TrainingError
from sparse_lm.train.manifest import CheckpointError
from sparse_lm.train.session import train

NAMED = {
    "step", "split", "loss", "total_loss", "gradient_norm", "nonfinite_steps", "dropped_fraction", "max_violation",
    "learning_rate", "tokens_per_second", "mfu", "step_seconds", "seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run on one device."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    tiny.run(tiny.experiment(), workdir)
    return workdir


def steps_in(workdir):
    with Checkpoints(workdir / "checkpoints", CheckpointConfig(), read_only=True) as checkpoints:
        return checkpoints.steps()


def files_of(workdir):
    return {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}


def test_every_step_has_one_row_with_the_keys_of_the_report(whole):
    rows = tiny.rows(whole)
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row in rows:
        assert row.keys() >= NAMED
    assert [row["step"] for row in rows if row["tokens_per_second"] is None] == [1]  # the one that compiles
    assert all(row["seconds"] > before["seconds"] for before, row in itertools.pairwise(rows))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert any(row["dropped_fraction"] > 0 for row in rows)
    assert rows[1]["learning_rate"] == pytest.approx(1e-2)  # the peak, after two steps of warm-up


def test_layers_come_with_the_rows(whole):
    row = tiny.rows(whole)[-1]
    assert np.sum(row["layers"]["load"], axis=1) == pytest.approx([1], abs=1e-4)


@pytest.mark.parametrize(("log_every", "expected"), [(1, 250), (2, 250), (100, 10), (500, 2)])
def test_layers_are_logged_about_as_often_whatever_log_every(tmp_path, log_every, expected):
    from sparse_lm.models.counts import count
    from sparse_lm.train.loop import Recorder

    made = tiny.trainer(tiny.experiment(train__steps=1000, train__log_every=log_every), tmp_path)
    recorder = Recorder(made, (None, None, None), count(made.experiment.model), 0)  # type: ignore[arg-type]
    logged = [step for step in range(1, 1001) if step % log_every == 0 and step % recorder.layers_every == 0]
    assert 0.5 * expected <= len(logged) <= 1.2 * expected


def test_evaluations_come_in_time_and_in_the_end(whole):
    rows = tiny.rows(whole, "validation")
    assert [row["step"] for row in rows] == [5, 10, 12]
    assert all(row["entropy_gap"] > 0 and len(row["losses_by_domain"]) == 2 for row in rows)


def test_the_newest_checkpoints_are_kept(whole):
    assert steps_in(whole) == (8, 12)


def test_no_assignment_is_lost(tmp_path):
    made = tiny.trainer(tiny.experiment(), tmp_path)
    step, lost = made.step, []

    def watched(state, batch, key):
        state, metrics = step(state, batch, key)
        assert metrics.parts.stats is not None
        lost.append(np.asarray(unaccounted(metrics.parts.stats, 2)).tolist())
        return state, metrics

    made.step = watched
    tiny.finish(made)
    assert lost == [[0]] * 12


def test_a_finished_run_says_so_and_writes_no_row(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0].report.parent, workdir)
    before = files_of(workdir)
    stream = io.StringIO()
    session = train(finished[0].experiment, workdir, stream)
    assert f"checkpoint of step 12 found in {workdir}: finished" in stream.getvalue()
    assert (session.outcome.step, session.outcome.resumed_from, session.outcome.stopped) == (12, 12, False)
    assert session.outcome.last == {}
    after = files_of(workdir)
    changed = {path.relative_to(workdir).parts[0] for path in after if after[path] != before.get(path)}
    assert changed <= {"config.json", "report.html", "tensorboard"}
    assert (workdir / "metrics.jsonl") in before


def test_more_steps_extend_a_run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    outcome = tiny.run(tiny.experiment(train__steps=15), tmp_path / "run")
    assert (outcome.resumed_from, outcome.step) == (12, 15)
    assert tiny.losses(tmp_path / "run")[:12] == tiny.losses(whole)
    assert len(tiny.losses(tmp_path / "run")) == 15
    assert steps_in(tmp_path / "run")[-1] == 15


def test_rows_of_a_run_that_was_killed_are_written_once(whole, tmp_path):
    """The checkpoint is of step 8, the rows and events go on to 12; also from a run without any checkpoint."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    for step in (8, 0):
        outcome = tiny.run(tiny.experiment(), tmp_path / "run")
        assert outcome.resumed_from == (step or None)
        assert tiny.losses(tmp_path / "run") == tiny.losses(whole)
        assert [row["step"] for row in tiny.rows(tmp_path / "run", "validation")] == [5, 10, 12]
        events = scalars_of(tmp_path / "run" / "tensorboard")["train/loss"]
        assert sorted(events) == list(range(1, 13))
        shutil.rmtree(tmp_path / "run" / "checkpoints")


def test_later_events_are_hidden_before_a_resume_writes_them_again(whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    monkeypatch.setattr(TensorBoardSink, "append", lambda *_: None)
    tiny.run(tiny.experiment(), tmp_path / "run")
    assert sorted(scalars_of(tmp_path / "run" / "tensorboard")["train/loss"]) == list(range(1, 9))


@pytest.mark.parametrize("after", [3, 4])
def test_a_signal_saves_and_the_rest_is_the_same(whole, tmp_path, after):
    stream = io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    outcome = tiny.finish(tiny.stopping(tiny.trainer(tiny.experiment(), tmp_path), after), stream)
    assert signal.getsignal(signal.SIGTERM) is before
    assert (outcome.stopped, outcome.step) == (True, after)
    assert f"stopped by a signal at step {after}" in stream.getvalue()
    assert steps_in(tmp_path)[-1] == after
    assert tiny.losses(tmp_path) == tiny.losses(whole)[:after]
    assert not tiny.run(tiny.experiment(), tmp_path).stopped
    assert tiny.losses(tmp_path) == tiny.losses(whole)
    assert tiny.rows(tmp_path, "validation")[-1]["loss"] == tiny.rows(whole, "validation")[-1]["loss"]


def test_a_signal_during_an_evaluation_saves_that_step(tmp_path):
    made = tiny.trainer(tiny.experiment(), tmp_path)
    evaluate = made.evaluate

    def interrupted(model, batches):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(model, batches)

    made.evaluate = interrupted
    outcome = tiny.finish(made)
    assert (outcome.stopped, outcome.step, steps_in(tmp_path)) == (True, 5, (4, 5))


def test_another_signal_later_is_not_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "AGAIN_SECONDS", 0.2)
    made = tiny.trainer(tiny.experiment(), tmp_path)
    step = made.step

    def twice(state, batch, key):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)  # ends early, by the exception
        return step(state, batch, key)

    made.step = twice
    # A shell starts what runs in its background with SIGINT ignored, which would then be what comes back.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            tiny.finish(made)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_goes_on_on_other_meshes_and_with_other_strategies(whole, tmp_path):
    for mesh, strategy, devices, after in (
        (MeshConfig(), "fsdp_ep", 1, 4),
        (MeshConfig(expert=4), "fsdp_over_ep", 8, 8),
        (MeshConfig(fsdp=2), "zero1_ep", 2, None),
    ):
        made = tiny.trainer(tiny.experiment(mesh=mesh, sharding__strategy=strategy), tmp_path, devices)
        outcome = tiny.finish(tiny.stopping(made, after) if after else made)
        assert outcome.step == (after or 12)
    np.testing.assert_allclose(tiny.losses(tmp_path), tiny.losses(whole), rtol=1e-5)


def test_a_lost_run_ends_and_what_was_good_stays(whole, tmp_path):
    tiny.finish(tiny.stopping(tiny.trainer(tiny.experiment(), tmp_path), 4))
    wild = tiny.experiment(optim__learning_rate=1e30, train__max_nonfinite=3, checkpoint__every=100)
    with pytest.raises(TrainingError, match=r"the last 3 steps up to 8 .*Lower optim\.learning_rate"):
        tiny.run(wild, tmp_path)
    lost = tiny.rows(tmp_path)
    assert [row["nonfinite_steps"] for row in lost] == [0, 0, 0, 0, 0, 1, 2, 3]
    assert all(None in (row["total_loss"], row["gradient_norm"]) for row in lost[5:])  # what JSON makes of a NaN
    assert steps_in(tmp_path) == (4,)
    tiny.run(tiny.experiment(), tmp_path)
    assert tiny.losses(tmp_path) == tiny.losses(whole)


def test_a_failing_save_ends_the_run(tmp_path, monkeypatch):
    from sparse_lm.train.manifest import ManifestHandler

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    for name in ("finalize", "async_save", "save"):
        if hasattr(ManifestHandler, name):
            monkeypatch.setattr(ManifestHandler, name, fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        tiny.run(tiny.experiment(), tmp_path)
    assert steps_in(tmp_path) == ()
    assert len(tiny.rows(tmp_path)) < 12


def test_a_dense_run_has_no_routing(tmp_path):
    tiny.run(tiny.experiment(model__moe=None, train__steps=2), tmp_path)
    for row in tiny.rows(tmp_path):
        assert row["dropped_fraction"] == 0 and "gini" not in row and "layers" not in row
    assert jax.device_count() == 8
