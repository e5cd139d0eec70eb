"""Joining several processes into one training: who takes part, where they meet, and what to do when they do not.

It comes before anything else touches a device: `detect`, then `connect`, then `jax.devices()` lists those of all.
"""

from __future__ import annotations

import dataclasses
import re
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax

from sparse_lm.config import ConfigError

KINDS = ("auto", "tpu", "slurm", "none")
SLURM_PORTS = 61440, 4096  # first port, and over how many the jobs are spread, as they may share a node
GRACE = 30  # seconds by which the runtime's own limit, which aborts without saying much, comes later than ours


class HostsError(RuntimeError):
    """The processes of a training did not come together; the message names the address. Trying again may help."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where this process stands among all.

    coordinator: `host:port` at which process 0 listens; None asks the TPU runtime for all three. processes: how many.
    process: which one this is, from 0. local_devices: the devices of this machine that it may use; None is all.
    init_timeout: seconds to wait for the others. heartbeat_timeout: seconds of silence after which one is dead.
    """

    coordinator: str | None
    processes: int | None
    process: int | None
    local_devices: tuple[int, ...] | None = None
    init_timeout: int = 300
    heartbeat_timeout: int = 100

    def __str__(self) -> str:
        if self.coordinator is None:
            return "the address that the TPU runtime gives"
        return self.coordinator


def detect(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    kind: str = "auto",
) -> Cluster | None:
    """The cluster that the arguments name, else the one that the environment tells of; None trains in one process.

    kind: `auto` looks for SLURM (a step of more than one task), then for several TPU workers in the environment;
    `tpu` asks the TPU runtime, `slurm` insists on SLURM, `none` looks for nothing.

    Raises `ConfigError` when the arguments are incomplete or impossible, or the named environment is not there.
    """
    if kind not in KINDS:
        raise ConfigError("cluster", kind, f"known: {', '.join(KINDS)}")
    if (coordinator, processes, process) != (None, None, None):
        return _explicit(coordinator, processes, process)
    if kind == "slurm" or (kind == "auto" and int(environment.get("SLURM_NTASKS", 1)) > 1):
        if "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment:
            return _slurm(environment)
        if kind == "slurm":
            raise ConfigError("cluster", kind, "there is no SLURM_PROCID: start it with srun, see launch/slurm.sh")
    workers = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if kind == "tpu" or (kind == "auto" and (len(workers) > 1 or "MEGASCALE_NUM_SLICES" in environment)):
        return Cluster(None, None, None)
    return None


def _explicit(coordinator: str | None, processes: int | None, process: int | None) -> Cluster | None:
    if coordinator is None or processes is None or process is None:
        missing = [
            n for n, v in (("coordinator", coordinator), ("processes", processes), ("process", process)) if v is None
        ]
        raise ConfigError(missing[0], None, "--coordinator=HOST:PORT, --processes=N and --process=I belong together")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ConfigError(
            "coordinator", coordinator, "is HOST:PORT, the same on all processes; process 0 listens there"
        )
    if processes < 1:
        raise ConfigError("processes", processes, "must be at least 1")
    if not 0 <= process < processes:
        raise ConfigError("process", process, f"must be from 0 to {processes - 1}, as there are processes={processes}")
    return Cluster(coordinator, processes, process)


def _slurm(environment: Mapping[str, str]) -> Cluster | None:
    tasks, nodes = int(environment["SLURM_NTASKS"]), int(environment.get("SLURM_STEP_NUM_NODES", 1))
    if tasks == 1:
        return None
    base, count = SLURM_PORTS
    port = base + int(environment["SLURM_JOB_ID"]) % count
    # Several tasks of a node share its devices, one each.
    local = (int(environment["SLURM_LOCALID"]),) if tasks > nodes else None
    first = first_node(environment["SLURM_STEP_NODELIST"])
    return Cluster(f"{first}:{port}", tasks, int(environment["SLURM_PROCID"]), local)


def first_node(nodes: str) -> str:
    """The first name of a SLURM node list, such as `gpu[007-009,012],login`."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\])?([^,\[]*)", nodes)
    if match is None:
        raise ConfigError("SLURM_STEP_NODELIST", nodes, "is no list of nodes; name the --coordinator instead")
    return "".join(part or "" for part in match.groups())


def connect(cluster: Cluster, initialize: Callable[..., Any] = jax.distributed.initialize) -> None:
    """Joins the cluster; afterwards `jax.devices()` are those of all its processes. Collectives on CPU go by gloo.

    On CPU several processes use no compilation cache: XLA stores programs without the order of their collectives.

    Raises `HostsError` naming the address when it cannot be found or is taken, or the others have not come in time.
    The runtime itself would abort the process without a Python exception, so it is given a little more time.
    """
    if cluster.coordinator is not None:
        _look(cluster)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    failures: list[Exception] = []

    def join() -> None:
        try:
            initialize(
                cluster.coordinator,
                cluster.processes,
                cluster.process,
                local_device_ids=cluster.local_devices,
                cluster_detection_method=None if cluster.coordinator is None else "deactivate",
                initialization_timeout=cluster.init_timeout + GRACE,
                heartbeat_timeout_seconds=cluster.heartbeat_timeout,
            )
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=join, daemon=True, name="join the cluster")
    thread.start()
    thread.join(cluster.init_timeout)
    who = "this process" if cluster.process is None else f"process {cluster.process} of {cluster.processes}"
    if thread.is_alive():
        raise HostsError(f"{who} waited {cluster.init_timeout} s for the others at {cluster}: {_why(cluster)}")
    if failures:
        raise HostsError(f"{who} cannot join the others at {cluster}: {failures[0]}") from failures[0]
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        # Gloo tells collectives apart by their order, which a program from the compilation cache has lost.
        jax.config.update("jax_enable_compilation_cache", False)


def _look(cluster: Cluster) -> None:
    """What can be known about the address at once."""
    host, port = _split(cluster)
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise HostsError(
            f"the coordinator {cluster} cannot be found ({error}); use the name or address by which all machines reach "
            "the one of process 0"
        ) from error
    if cluster.process == 0:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                raise HostsError(
                    f"process 0 cannot listen at {cluster} ({error}); end what does, or choose another port for all"
                ) from error


def _why(cluster: Cluster) -> str:
    if cluster.coordinator is None:
        return "start the same command on all workers of the slice"
    if cluster.process == 0:
        return (
            f"fewer than {cluster.processes} came; start the same command with every --process, and see that the other "
            "machines reach this port (firewall), or wait longer with --init_timeout"
        )
    try:
        socket.create_connection(_split(cluster), timeout=2).close()
    except OSError as error:
        return f"nothing answers there ({error}); start process 0 on that machine, and see that its firewall is open"
    return f"process 0 answers, but not all {cluster.processes} came; start the others, or wait longer (--init_timeout)"


def _split(cluster: Cluster) -> tuple[str, int]:
    host, _, port = str(cluster.coordinator).rpartition(":")
    return host.strip("[]"), int(port)
