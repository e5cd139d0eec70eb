"""What the processes of one training do together: rows of a batch, agreement, stopping, and arrays from everywhere.

In a training of one process each of these is trivial, so that the loop does not ask how many there are.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from sparse_lm.config import ConfigError
from sparse_lm.sharding import Rules

AGAIN_SECONDS = 1.0
SEEN_SECONDS = 60.0  # network file systems show new files late: some cache that there was none


def is_first() -> bool:
    """Whether this is the process that writes what only one should."""
    return jax.process_index() == 0


def process_rows(mesh: Mesh, rules: Rules, size: int, devices: Collection[Any] | None = None) -> tuple[int, ...]:
    """The rows of a batch of `size` that lie on `devices` (None: those of this process), in ascending order.

    Where the batch is cut over all processes they share no row; those joined by `model` or `stage` have the same ones.
    """
    devices = mesh.local_devices if devices is None else devices
    cuts = NamedSharding(mesh, rules.act("B")).devices_indices_map((size,))
    return tuple(sorted({row for device in devices for row in range(size)[cuts[device][0]]}))


def place(mesh: Mesh, rules: Rules, x: np.ndarray, rows: tuple[int, ...], size: int) -> jax.Array:
    """A [size, L] array on the mesh, cut along B, from `rows`, those that this process holds of it."""
    sharding = NamedSharding(mesh, rules.act("B."))

    def shard(index: Any) -> np.ndarray:
        held = range(size)[index[0]]
        start = bisect.bisect_left(rows, held.start)
        return x[start : start + len(held), index[1]]

    return jax.make_array_from_callback((size, *x.shape[1:]), sharding, shard)


def agree(what: Mapping[str, object]) -> None:
    """Raises `ConfigError` on every process, naming the key and who differs, unless all have the same values.

    Also waits for all of them. Values are compared by their `str`.
    """
    if jax.process_count() == 1:
        return
    digests_KX = np.stack([np.frombuffer(hashlib.sha256(str(v).encode()).digest(), np.uint8) for v in what.values()])
    all_PKX = multihost_utils.process_allgather(digests_KX)
    for number, (key, value) in enumerate(what.items()):
        others = [p for p in range(len(all_PKX)) if (all_PKX[p, number] != all_PKX[0, number]).any()]
        if others:
            named = ", ".join(map(str, others[:8])) + (" and more" if others[8:] else "")
            raise ConfigError(
                key, f"{value}"[:60], f"process 0 and process {named} differ in it; start all with one command, one "
                "version of the code and one copy of the data, in one directory that all of them share",
            )  # fmt: skip


def see(path: Path, seconds: float = SEEN_SECONDS) -> None:
    """Waits until this process sees a file that process 0 has written.

    Raises `ConfigError` when it does not: the directory of a run lies on a file system that all machines share.
    """
    agree({"path": path})
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise ConfigError(
                "workdir", str(path.parent), f"process {jax.process_index()} does not see the {path.name} that process "
                "0 has written; choose a directory on a file system that all machines share",
            )  # fmt: skip
        time.sleep(0.05)


def fetch(tree: Any) -> Any:
    """The tree with every array whole and on the host. Every process calls it; one array at a time is gathered."""
    return jax.device_get(tree) if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """A function that tells, asked before every step with its number, whether to stop there: the same on all processes.

    SIGTERM and SIGINT ask for it, on any of them. Another signal acts as usual if it comes a second or more after the
    first: a cluster may send one to this process and, once more, to the one above, which passes it on. Of several
    processes, SIGTERM never acts as usual.
    """
    together = jax.process_count() > 1
    caught: list[float] = []
    before = {}

    def handler(number, _):
        caught.append(time.monotonic())
        if together:
            os.kill(os.getpid(), signal.SIGTERM)
        if caught[-1] - caught[0] >= AGAIN_SECONDS:
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)

    # Of several processes, the runtime has taken SIGTERM: it makes all of them agree on the step.
    for number in (signal.SIGINT,) if together else (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError):  # not the main thread, as in a notebook's worker
            before[number] = signal.signal(number, handler)
    try:
        yield multihost_utils.reached_preemption_sync_point if together else lambda step: bool(caught)
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
