"""Trainings of several real processes: the same numbers as one, one writer, and ends that all of them share."""

from __future__ import annotations

import json
import os
import resource
import signal

import mains
import pytest
import tiny
import tiny_config
import together
from tensorboard_events import scalars_of

from sparse_lm.config import from_dict
from sparse_lm.experiment import Experiment
from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.config import CheckpointConfig

STEPS = "--config.train.steps=24"


def configuration(steps: int) -> Experiment:
    return from_dict(Experiment, tiny_config.get_config()).replace(train__steps=steps)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The directory of 24 steps in one process with two devices."""
    workdir = tmp_path_factory.mktemp("runs") / "one"
    tiny.run(configuration(24), workdir, devices=2)
    return workdir


def test_two_processes_stop_together_and_one_goes_on(expected, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    processes = together.start(tmp_path, 2, STEPS)
    together.wait_for_rows(tmp_path, 5, processes)
    processes[1].send_signal(signal.SIGTERM)  # not to the one that writes
    ended = together.finish(processes)
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert not cache.exists()  # their programs would come back without the order of their collectives
    done = len(tiny.losses(tmp_path))
    assert 5 <= done < 24
    assert f"stopped by a signal at step {done}" in ended[0][1] and "step" not in ended[1][1]
    with Checkpoints(tmp_path / "checkpoints", CheckpointConfig(), read_only=True) as checkpoints:
        assert checkpoints.latest_step() == done
    assert len(list((tmp_path / "tensorboard").glob("events.*"))) == 1 and (tmp_path / "report.html").exists()
    assert json.loads((tmp_path / "config.json").read_text())["device"]["count"] == 2
    assert tiny.run(configuration(24), tmp_path, devices=2).resumed_from == done
    together.assert_same_rows(tmp_path, expected)
    assert len(scalars_of(tmp_path / "tensorboard")["train/loss"]) >= 24


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(), ("--config.mesh.expert=4",), ("--config.mesh.fsdp=2", "--config.mesh.model=4")])
def test_two_and_four_processes_make_the_rows_of_one(mesh, tmp_path):
    shared = (*mesh, "--config.train.steps=8", "--config.train.eval_every=4")
    status, _, errors = mains.call("train", mains.CONFIG, f"--workdir={tmp_path / 'one'}", "--devices=8", *shared)
    assert status == 0, errors
    for count in (2, 4):
        together.train(tmp_path / f"{count}", count, *shared, devices=8 // count)
        together.assert_same_rows(tmp_path / f"{count}", tmp_path / "one")


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_processes(expected, tmp_path):
    done = 0
    for count in (4, 2, 4):
        processes = together.start(tmp_path, count, STEPS)
        together.wait_for_rows(tmp_path, done + 4, processes)
        processes[-1].send_signal(signal.SIGTERM)
        ended = together.finish(processes)
        assert [status for status, _, _ in ended] == [0] * count, ended
        assert ("resuming" in ended[0][1]) == (done > 0)
        done = len(tiny.losses(tmp_path))
    tiny.run(configuration(24), tmp_path)
    together.assert_same_rows(tmp_path, expected)


@pytest.mark.slow
def test_a_killed_process_is_replaced_under_supervision(expected, tmp_path):
    processes = together.start(tmp_path, 2, STEPS, "--supervise=6")
    together.wait_for_rows(tmp_path, 12, processes)
    victim = children(processes[1].pid)
    assert len(victim) == 1
    os.kill(victim[0], signal.SIGKILL)
    ended = together.finish(processes)
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert "the training ended with signal 9 (status 137); restart 1 of 6" in ended[1][2]
    assert "the training ended with" in ended[0][2]
    together.assert_same_rows(tmp_path, expected)
    assert "checkpoint of step 7 found" in ended[0][1]


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.slow
def test_an_error_of_one_ends_all(tmp_path):
    """The first one cannot write rows any more: its files may not grow beyond what metrics.jsonl has now."""
    processes = together.start(tmp_path, 2, STEPS)
    together.wait_for_rows(tmp_path, 2, processes)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    resource.prlimit(processes[0].pid, resource.RLIMIT_FSIZE, (size, size))
    ended = together.finish(processes)
    assert all(status not in (0, 2) for status, _, _ in ended), ended
    assert "File too large" in ended[0][2] and "error: the other processes end as well" in ended[0][2]


@pytest.mark.slow
def test_processes_that_were_started_differently_are_refused(tmp_path):
    port = together.free_port()
    where = (f"--coordinator=localhost:{port}", "--processes=2", f"--workdir={tmp_path}", "--init_timeout=120")
    processes = [
        mains.start("train", mains.CONFIG, *where, f"--process={i}", "--devices=1", f"--config.seed={i}")
        for i in (0, 1)
    ]
    ended = together.finish(processes)
    assert [status for status, _, _ in ended] == [2, 2]
    for _, _, errors in ended:
        assert "process 0 and process 1 differ in it" in errors and "Traceback" not in errors
    assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_one_that_never_comes(tmp_path):
    where = (f"--coordinator=localhost:{together.free_port()}", "--processes=2", "--init_timeout=4", "--devices=1")
    for process, says in ((0, "fewer than 2 came"), (1, "nothing answers there")):
        status, _, errors = mains.call("train", mains.CONFIG, f"--workdir={tmp_path}", *where, f"--process={process}")
        assert status == 75
        (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert f"process {process} of 2 waited 4 s for the others at localhost:" in line and says in line
