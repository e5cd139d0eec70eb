"""Compiled plans of many models: each by a process of its own, kept as files, and never made twice."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TextIO

from sparse_lm.planning import record
from sparse_lm.planning.catalogue import Entry
from sparse_lm.telemetry.format import duration

Run = Callable[[Entry, Path], int]  # makes the plan of an entry as a file; the exit status


def files(entries: Sequence[Entry], folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> the compiled plan in `folder`, for entries that have one of today's configuration and versions."""
    found = {entry.name: record.read(file_of(entry, folder), entry.experiment, entry.topology) for entry in entries}
    return {name: plan for name, plan in found.items() if plan is not None}


def file_of(entry: Entry, folder: Path) -> Path:
    """Where the plan of an entry is kept."""
    return folder / f"{entry.name.replace(':', '-')}.json"


def compile_all(
    entries: Sequence[Entry], folder: Path, run: Run, parallel: int = 1, stream: TextIO = sys.stderr
) -> int:
    """Compiles what `folder` has no plan of, `parallel` at a time; tells of each, and returns how many failed.

    One that fails leaves no plan, the others go on, and the next call tries it again.
    """
    before = files(entries, folder)
    todo = [entry for entry in entries if entry.name not in before]
    stream.write(f"{len(entries)} models: {len(before)} compiled before, {len(todo)} to do\n")
    stream.flush()
    start, failed = time.monotonic(), 0
    with ThreadPoolExecutor(parallel) as pool:
        began = {pool.submit(run, entry, file_of(entry, folder)): entry for entry in todo}
        for done, future in enumerate(as_completed(began), 1):
            entry = began[future]
            status = future.result()
            failed += status != 0
            rest = duration((time.monotonic() - start) / done * (len(todo) - done))
            words = f"failed (status {status})" if status else "compiled"
            stream.write(f"[{done}/{len(todo)}] {entry.name}: {words}; {rest} to go\n")
            stream.flush()
    return failed
