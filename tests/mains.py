"""Starts the mains of experiments/ as a person would, in a process of their own."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = f"--config={ROOT / 'tests' / 'tiny_config.py'}"


def start(main: str, *arguments: str) -> subprocess.Popen[str]:
    """The running process, on one device unless the arguments say otherwise; it shares the cache of compilations."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT / "tests"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "experiments" / f"{main}.py"), *arguments],
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def call(main: str, *arguments: str) -> tuple[int, str, str]:
    """Exit status, output and errors."""
    process = start(main, *arguments)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def interrupt(process: subprocess.Popen[str], number: int, file: pathlib.Path, lines: int) -> tuple[int, str]:
    """Sends a signal once `file` has so many lines (0: once it is there); exit status and errors of the process."""
    while process.poll() is None:
        if file.exists() and file.read_bytes().count(b"\n") >= lines:
            process.send_signal(number)
            break
        time.sleep(0.0005)
    return process.wait(timeout=600), process.communicate()[1]
