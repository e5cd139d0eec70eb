"""Training in a process of its own that is killed or asked to stop, and started again by the same command."""

from __future__ import annotations

import random
import signal

import mains
import pytest
import tiny

from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.config import CheckpointConfig


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The losses of the run that nobody interrupts."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    status, _, errors = mains.call("train", mains.CONFIG, f"--workdir={workdir}")
    assert status == 0, errors
    found = tiny.losses(workdir)
    assert len(found) == 60
    return found, [row["loss"] for row in tiny.rows(workdir, "validation")]


def kill(workdir, file: str, lines: int) -> None:
    process = mains.start("train", mains.CONFIG, f"--workdir={workdir}")
    status, errors = mains.interrupt(process, signal.SIGKILL, workdir / file, lines)
    assert status == -signal.SIGKILL, errors


def goes_on(workdir, expected) -> str:
    status, out, errors = mains.call("train", mains.CONFIG, f"--workdir={workdir}")
    assert status == 0, errors
    assert tiny.losses(workdir) == expected[0]  # bit for bit, every step once
    assert [row["loss"] for row in tiny.rows(workdir, "validation")] == expected[1]
    return out


def test_killed_before_the_first_checkpoint_and_between_two(expected, tmp_path):
    kill(tmp_path, "config.json", 0)
    kill(tmp_path, "metrics.jsonl", 24)
    assert "resuming" in goes_on(tmp_path, expected)


@pytest.mark.slow
def test_killed_at_five_random_moments(expected, tmp_path):
    kill(tmp_path, "config.json", 0)
    for lines in sorted(random.sample(range(1, 58), 4)):
        kill(tmp_path, "metrics.jsonl", lines)
    goes_on(tmp_path, expected)


def test_asked_to_stop(expected, tmp_path):
    process = mains.start("train", mains.CONFIG, f"--workdir={tmp_path}")
    status, errors = mains.interrupt(process, signal.SIGTERM, tmp_path / "metrics.jsonl", 16)
    assert status == 0, errors
    done = len(tiny.losses(tmp_path))
    assert 16 <= done < 60
    with Checkpoints(tmp_path / "checkpoints", CheckpointConfig(), read_only=True) as checkpoints:
        assert checkpoints.latest_step() == done
    assert (tmp_path / "report.html").exists()
    assert f"checkpoint of step {done} found" in goes_on(tmp_path, expected)
