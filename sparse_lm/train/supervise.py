"""Restarts a training that crashed: from outside, because a process whose peer has died is aborted by its runtime."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from sparse_lm.train.run import CHECKPOINTS_NAME
from sparse_lm.train.signals import on_signals

REFUSED = 2  # the status of an error that a restart would meet again
LONGEST_PAUSE = 60.0
POLL_SECONDS = 0.1


def newest_checkpoint(workdir: Path) -> int:
    """The newest committed step of a run, read without touching a device; -1 without any."""
    directory = workdir / CHECKPOINTS_NAME
    if not directory.is_dir():
        return -1
    return max((int(path.name) for path in directory.iterdir() if path.name.isdigit()), default=-1)


def supervise(
    command: Sequence[str],
    workdir: Path,
    restarts: int,
    stream: TextIO,
    pause: Callable[[int], float] = lambda tried: min(LONGEST_PAUSE, 2.0 ** (tried - 1)),
) -> int:
    """Runs `command` until it ends with status 0, and starts it again when it ends otherwise; the status in the end.

    It is given up after `restarts` restarts without a checkpoint in `workdir` newer than before, with the last status
    (128 + n for a signal n), and at once on status 2, an error that names its way out. SIGTERM and SIGINT are passed
    on, and end it once the command has ended. pause: seconds before restart number 1, 2, ... without progress.
    """
    asked: list[int] = []
    running: list[subprocess.Popen] = []

    def forward(number, _):
        asked.append(number)
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    def tell(text: str) -> None:
        stream.write(f"supervisor: {text}\n")
        stream.flush()

    with on_signals(forward):
        newest, tried = newest_checkpoint(workdir), 0
        while True:
            # In a session of its own, so that Ctrl-C reaches it once: through us.
            running[:] = [subprocess.Popen(command, start_new_session=True)]
            if asked:  # between the pause and the start
                running[0].send_signal(asked[-1])
            status = _wait(running[0])
            if status == 0 or asked:
                return status
            how = f"status {status}" if status < 128 else f"signal {status - 128} (status {status})"
            if status == REFUSED:
                tell(f"the training ended with {how}, which a restart does not cure; see its error above")
                return status
            found = newest_checkpoint(workdir)
            newest, tried = (found, 1) if found > newest else (newest, tried + 1)
            at = "no checkpoint" if newest < 0 else f"the checkpoint of step {newest}"
            if tried > restarts:
                tell(f"the training ended with {how}; giving up after {restarts} restarts at {at}; see its errors")
                return status
            tell(f"the training ended with {how}; restart {tried} of {restarts} from {at} in {pause(tried):g} s")
            end = time.monotonic() + pause(tried)
            while time.monotonic() < end and not asked:
                time.sleep(POLL_SECONDS)
            if asked:
                return 128 + asked[-1]


def _wait(process: subprocess.Popen) -> int:
    status = process.wait()
    return status if status >= 0 else 128 - status
