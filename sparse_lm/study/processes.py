"""The same command several times side by side on this machine, each with its share of the runs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sparse_lm.config import ConfigError
from sparse_lm.study.plan import Plan
from sparse_lm.study.runner import Shard
from sparse_lm.train.signals import on_signals

POLL_SECONDS = 0.2


def check_side_by_side(plan: Plan, key: str, value: object) -> None:
    """Raises `ConfigError`, for the option that asks for it, when runs side by side would spoil what is measured."""
    if plan.study.budget == "time":
        raise ConfigError(key, value, "equal wall time needs the machine for itself; leave it out")


class Ended(NamedTuple):
    """status: 0 when all processes ended so, else the worst one. stopped: whether a signal had asked them to end."""

    status: int
    stopped: bool


def run_processes(command: Sequence[str], shard: Shard, count: int, environment: Mapping[str, str]) -> Ended:
    """Runs `command --shard=i/n` for each of `count` parts of the shard, in this environment, and waits.

    SIGTERM and Ctrl-C are passed on to the processes, and waited for. XLA gets as many threads in each as there are
    cores for it (NPROC, unless the environment has it): more would wait for each other, and cost time that others need.
    """
    stopped = False
    surroundings = {"NPROC": str(max(1, (os.cpu_count() or 1) // count)), **environment}
    started = [
        subprocess.Popen([*command, f"--shard={part.index}/{part.count}"], env=surroundings)
        for part in shard.split(count)
    ]

    def forward(number, _):
        nonlocal stopped
        stopped = True
        for process in started:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    with on_signals(forward):
        while any(process.poll() is None for process in started):
            time.sleep(POLL_SECONDS)
    # A process that a signal killed has a negative status, which is a failure like others.
    return Ended(max(abs(process.returncode) for process in started), stopped)
