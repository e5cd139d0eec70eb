"""How long it takes from nothing to the first train step, with a cold and with a warm compilation cache.

Each measurement is a process of its own, since imports and traces are cached within one.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import jax

from sparse_lm.bench.harness import Drawn, Options, Paired, paired
from sparse_lm.config import from_dict, to_dict
from sparse_lm.data.loader import TrainLoader, build_dataset
from sparse_lm.experiment import Experiment, resolved
from sparse_lm.mesh import make_mesh
from sparse_lm.optim.build import build_optimizer
from sparse_lm.sharding import put
from sparse_lm.train import session  # noqa: F401  (what a training imports belongs to the time of the import)
from sparse_lm.train.loop import TrainingError
from sparse_lm.train.state import create_state
from sparse_lm.train.step import make_train_step

REPEATS, QUICK_REPEATS = 3, 1
STEPS = 4  # taken by each process, so that a step that is traced again shows
CHILD = """import time
start = time.perf_counter()
from sparse_lm.bench.startup import child
child(start)
"""


class StartupError(TrainingError):
    """A measured process failed; the message has its last words."""


@dataclasses.dataclass(frozen=True)
class Phases:
    """Seconds of one process. traces: how often its `STEPS` steps traced the train step; once is right.

    imports: of the package and all that training needs. data: building the dataset. state: making fresh weights and
    optimizer state. first_step: its batch, trace and compilation included. later_step: the quickest of the others.
    """

    imports: float
    data: float
    state: float
    first_step: float
    later_step: float
    traces: int


@dataclasses.dataclass(frozen=True)
class Start:
    """One row: the median process of a kind. process_seconds: from spawn to exit.

    ratio: process seconds with a cold cache over those with a warm one; None in the row of the warm cache.
    """

    case: str
    phases: Phases
    process_seconds: float
    ratio: Paired | None

    def cells(self) -> dict[str, str]:
        """See `harness.Row`."""
        phases = dataclasses.asdict(self.phases)
        traces = phases.pop("traces")
        ratio = "-" if self.ratio is None else f"{self.ratio.ratio:.2f} ({self.ratio.low:.2f}..{self.ratio.high:.2f})"
        seconds = {f"{name.replace('_', ' ')} s": f"{value:.2f}" for name, value in phases.items()}
        return {
            "cache": self.case,
            **seconds,
            "process s": f"{self.process_seconds:.2f}",
            "cold / warm": ratio,
            "traces": f"{traces} in {STEPS} steps",
        }

    def drawn(self) -> Drawn:
        """See `harness.Row`."""
        phases = dataclasses.asdict(self.phases)
        del phases["traces"]
        return Drawn(self.case, {**phases, "process": self.process_seconds}, "seconds")

    def to_json(self) -> dict[str, Any]:
        """See `harness.Row`."""
        phases = dataclasses.asdict(self.phases)
        traces = phases.pop("traces")
        seconds = {f"{name}_seconds": value for name, value in phases.items()}
        ratio = None if self.ratio is None else dataclasses.asdict(self.ratio)
        return {
            "case": self.case,
            **seconds,
            "traces": traces,
            "process_seconds": self.process_seconds,
            "cold_over_warm": ratio,
        }


def startup(options: Options) -> list[Start]:
    """Two rows, cold and warm. Leaves this process's jax untouched, so that the measured ones get the accelerator.

    Raises `StartupError` when a process fails.
    """
    repeats = options.repeats or (QUICK_REPEATS if options.quick else REPEATS)
    cold: list[Phases] = []
    warm: list[Phases] = []
    with tempfile.TemporaryDirectory() as scratch:
        caches = (Path(scratch) / str(number) for number in itertools.count())
        current = Path(scratch)

        def start_cold():
            nonlocal current
            current = next(caches)
            cold.append(measure(options.experiment, current))

        def start_warm():
            warm.append(measure(options.experiment, current))

        # The first process also warms the file cache of the operating system; a quick look does not wait for it.
        warm_up = 0 if options.quick else 1
        times = paired(start_cold, start_warm, repeats, warm_up)
    return [
        Start("cold", _median(cold[warm_up:]), times.seconds_a, times),
        Start("warm", _median(warm[warm_up:]), times.seconds_b, None),
    ]


def measure(experiment: Experiment, cache: Path) -> Phases:
    """One process with its compilation cache in a directory, on the devices that this one would use."""
    settings = cast(Any, jax.config)  # its flags are added at run time
    request = {
        "experiment": to_dict(experiment),
        "cache": str(cache),
        "platforms": settings.jax_platforms,
        "devices": settings.jax_num_cpu_devices,
    }
    # -P keeps the current directory off the path: nothing there can stand in for the package.
    command = [sys.executable, "-P", "-c", CHILD]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode:
        raise StartupError(f"the measured process ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return Phases(**json.loads(done.stdout.splitlines()[-1]))


def child(start: float) -> None:
    """What the measured process runs: its request comes on stdin, its `Phases` go to stdout as JSON.

    start: `time.perf_counter()` before the package was imported.
    """
    times = [start, time.perf_counter()]
    gc.freeze()  # as all mains do
    request = json.load(sys.stdin)
    jax.config.update("jax_compilation_cache_dir", request["cache"])
    # By default only what compiles for a second is kept; here the cache is either empty or complete.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if request["platforms"]:
        jax.config.update("jax_platforms", request["platforms"])
    if request["devices"] > 0:
        jax.config.update("jax_num_cpu_devices", request["devices"])
    print(json.dumps(dataclasses.asdict(_phases(from_dict(Experiment, request["experiment"]), times))))


def _phases(experiment: Experiment, times: list[float]) -> Phases:
    traces = 0

    def listen(event: str, duration_secs: float, **names: Any) -> None:
        nonlocal traces
        traces += event == "/jax/core/compile/jaxpr_trace_duration" and names.get("fun_name") == "step"

    jax.monitoring.register_event_duration_secs_listener(listen)
    train, now = experiment.train, time.perf_counter
    seed = experiment.seed if experiment.data_seed is None else experiment.data_seed
    dataset = build_dataset(experiment.data, seed)
    loader = TrainLoader(dataset, train.batch_size, seed)
    times = [*times, now()]
    experiment = resolved(experiment, dataset.vocab_size)
    mesh = make_mesh(experiment.mesh_sizes(jax.device_count()))
    with jax.set_mesh(mesh):
        optimizer = build_optimizer(experiment.optim, train.steps)
        root = jax.random.key(experiment.seed)
        create = jax.jit(lambda key: create_state(key, experiment.model, optimizer, experiment.sharding.rules))
        state = jax.block_until_ready(create(root))
        times.append(now())
        step = make_train_step(optimizer, train.accumulate, len(dataset.domains))
        for number in range(STEPS):
            batch = jax.tree.map(lambda x: put(mesh, experiment.sharding.rules, x, "B."), loader.batch_at(number))
            state, _ = jax.block_until_ready(step(state, batch, root))
            times.append(now())
    imports, data, made, first, *later = (after - before for before, after in itertools.pairwise(times))
    return Phases(imports, data, made, first, min(later), traces)


def _median(processes: list[Phases]) -> Phases:
    """The process whose first step is the median one."""
    return sorted(processes, key=lambda phases: phases.first_step)[len(processes) // 2]
