"""What a number was measured on, beside the accelerator: the processor, how many of its cores, versions of packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path


def cpu_model(path: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, as exactly as this system tells it."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine() or "unknown CPU"


def cpu_cores() -> int:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def version(package: str) -> str | None:
    """Of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
