"""Flags of a training of several processes, and of its supervisor; the environment of a cluster is read here."""

import os
import sys
from pathlib import Path

from absl import flags

RESTARTS = 3
# A flag with a value that may be left out, which absl has not.
sys.argv[:] = [f"{a}={RESTARTS}" if a in ("--supervise", "-supervise") else a for a in sys.argv]

_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, the same for all processes.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes train together.")
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.")
_CLUSTER = flags.DEFINE_string(
    "cluster",
    "auto",
    "Without a coordinator: auto looks for SLURM and TPU workers in the environment; tpu, slurm, none.",
)
_INIT_TIMEOUT = flags.DEFINE_integer("init_timeout", 300, "Seconds to wait for the other processes.", 1)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer("heartbeat_timeout", 100, "Seconds of silence until a process is dead.", 1)
_SUPERVISE = flags.DEFINE_integer(
    "supervise", None, f"Restart after a crash, so often in a row without a newer checkpoint (alone: {RESTARTS}).", 1
)


def join() -> None:
    """Makes this process one of several where flags or environment say so. Before anything touches a device.

    Raises `ConfigError` and `HostsError`.
    """
    import dataclasses

    from sparse_lm.train.distributed import connect, detect

    cluster = detect(os.environ, _COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _CLUSTER.value)
    if cluster is not None:
        limits = {"init_timeout": _INIT_TIMEOUT.value, "heartbeat_timeout": _HEARTBEAT_TIMEOUT.value}
        connect(dataclasses.replace(cluster, **limits))


def supervised(workdir: Path) -> int | None:
    """With --supervise: runs this same command without it until it ends well or is given up; its status."""
    if _SUPERVISE.value is None:
        return None
    from sparse_lm.train.supervise import supervise

    command = [sys.executable, *(a for a in sys.argv if not a.lstrip("-").startswith("supervise="))]
    return supervise(command, workdir, _SUPERVISE.value, sys.stderr)
