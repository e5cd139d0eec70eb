"""Several processes of one training on this machine, and what their directory says afterwards."""

from __future__ import annotations

import pathlib
import socket
import subprocess
import time
from typing import Any

import mains
import numpy as np
import tiny

# What depends on the clock.
TIMES = {"tokens_per_second", "mfu", "step_seconds", "seconds"}


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def start(workdir: pathlib.Path, count: int, *arguments: str, devices: int = 1) -> list[subprocess.Popen[str]]:
    """`count` processes with so many devices each; those of a dead one are noticed within ten seconds."""
    where = f"--coordinator=localhost:{free_port()}"
    common = (mains.CONFIG, f"--workdir={workdir}", f"--devices={devices}", where, f"--processes={count}")
    limits = ("--heartbeat_timeout=10", "--init_timeout=120")
    return [mains.start("train", *common, f"--process={i}", *limits, *arguments) for i in range(count)]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Status, output and errors of each."""
    try:
        ended = [process.communicate(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, ended, strict=True)]


def train(workdir: pathlib.Path, count: int, *arguments: str, devices: int = 1) -> list[tuple[int, str, str]]:
    """Trains with `count` processes, all of which have to end well."""
    ended = finish(start(workdir, count, *arguments, devices=devices))
    assert [status for status, _, _ in ended] == [0] * count, ended
    return ended


def wait_for_rows(workdir: pathlib.Path, number: int, processes: list[subprocess.Popen[str]]) -> None:
    """Returns when metrics.jsonl has so many lines; fails when a process ends before."""
    file = workdir / "metrics.jsonl"
    while not file.exists() or file.read_bytes().count(b"\n") < number:
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.002)


def assert_same_rows(workdir: pathlib.Path, expected: pathlib.Path, rtol: float = 1e-5) -> None:
    """All numbers of all rows, those per layer and expert included, but for times."""
    for split in ("train", "validation"):
        found, wanted = tiny.rows(workdir, split), tiny.rows(expected, split)
        assert [row["step"] for row in found] == [row["step"] for row in wanted]
        for row, other in zip(found, wanted, strict=True):
            assert row.keys() == other.keys()
            for key in row.keys() - TIMES:
                _compare(row[key], other[key], rtol, f"{split} {row['step']} {key}")


def _compare(value: Any, other: Any, rtol: float, what: str) -> None:
    if isinstance(value, dict):
        assert value.keys() == other.keys(), what
        for key in value:
            _compare(value[key], other[key], rtol, f"{what}/{key}")
    elif isinstance(value, (list, float)):
        # Arrays per expert are rounded to five digits, where the last one may go either way.
        np.testing.assert_allclose(value, other, rtol=rtol, atol=1.1e-5, err_msg=what)
    else:
        assert value == other, what
