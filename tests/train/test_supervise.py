"""Restarts of a command that crashes, with commands that take milliseconds."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time

import pytest

from sparse_lm.train.supervise import newest_checkpoint, supervise

# Appends its number to a file `starts`; what it does next is the number's part of the script.
SCRIPT = """
import os, pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])
with open(here / "starts", "a") as file:
    file.write("x")
start = len((here / "starts").read_text())
def save(step):
    (here / "checkpoints" / str(step)).mkdir(parents=True)
"""


class Case:
    """A command and what came of supervising it."""

    def __init__(self, workdir, body: str):
        self.workdir, self.stream, self.pauses = workdir, io.StringIO(), []
        self.command = [sys.executable, "-S", "-c", SCRIPT + body, str(workdir)]

    def run(self, restarts: int = 3, seconds: float = 0.0) -> int:
        def pause(tried: int) -> float:
            self.pauses.append(tried)
            return seconds

        return supervise(self.command, self.workdir, restarts, self.stream, pause)

    @property
    def starts(self) -> int:
        return len((self.workdir / "starts").read_text())

    @property
    def told(self) -> list[str]:
        return self.stream.getvalue().splitlines()


@pytest.fixture
def case(tmp_path):
    return lambda body: Case(tmp_path, body)


def test_what_ends_well_is_not_restarted(case):
    made = case("")
    assert made.run() == 0
    assert made.starts == 1 and made.told == []


def test_it_is_restarted_until_it_ends_well(case):
    made = case("save(start) if start == 1 else None\nos.abort() if start == 1 else sys.exit(start == 2)")
    assert made.run() == 0
    assert made.starts == 3
    assert made.told == [
        "supervisor: the training ended with signal 6 (status 134); restart 1 of 3 from the checkpoint of step 1 "
        "in 0 s",
        "supervisor: the training ended with status 1; restart 2 of 3 from the checkpoint of step 1 in 0 s",
    ]


def test_progress_starts_the_count_again(case):
    made = case("save(10 * start) if start in (2, 4) else None\nsys.exit(0 if start == 7 else 1)")
    assert made.run(restarts=3) == 0
    assert made.starts == 7
    assert sorted(set(made.pauses)) == [1, 2, 3]
    assert [int(line.split("restart ")[1][0]) for line in made.told] == [1, 1, 2, 1, 2, 3]


def test_without_progress_it_is_given_up_with_the_last_status(case):
    made = case("os.kill(os.getpid(), signal.SIGKILL)")
    assert made.run(restarts=2) == 128 + signal.SIGKILL
    assert made.starts == 3
    assert made.told[-1] == (
        "supervisor: the training ended with signal 9 (status 137); giving up after 2 restarts at no checkpoint; "
        "see its errors"
    )


def test_an_error_with_a_way_out_is_not_tried_again(case):
    made = case("sys.exit(2)")
    assert made.run() == 2
    assert made.starts == 1 and "a restart does not cure" in made.told[0]


@pytest.mark.parametrize(("ends", "status"), [("sys.exit(0)", 0), ("sys.exit(5)", 5)])
def test_a_signal_is_passed_on_and_ends_it(case, ends, status):
    made = case(
        f"signal.signal(signal.SIGTERM, lambda *_: {ends})\n(here / 'ready').touch()\ntime.sleep(60)\nsys.exit(9)"
    )
    send_when(made.workdir / "ready")
    assert made.run() == status
    assert made.starts == 1 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_during_the_pause_ends_it(case):
    made = case("sys.exit(1)")
    send_when(made.workdir / "starts", lambda: bool(made.told))
    before = time.monotonic()
    assert made.run(seconds=60) == 128 + signal.SIGTERM
    assert made.starts == 1 and time.monotonic() - before < 30


def send_when(path, also=lambda: True) -> None:
    """SIGTERM to this process once the file is there."""

    def wait() -> None:
        while not (path.exists() and also()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def test_only_committed_steps_are_checkpoints(tmp_path):
    assert newest_checkpoint(tmp_path) == -1
    for name in ("7", "14", "21.orbax-checkpoint-tmp", "damaged-28"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == 14
