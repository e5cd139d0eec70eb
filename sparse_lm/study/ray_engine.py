"""A study's runs as tasks of a Ray cluster, in the same directories, on a file system that its machines share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax

from sparse_lm.config import ConfigError
from sparse_lm.study.evaluation import evaluate_run
from sparse_lm.study.plan import Plan, Run
from sparse_lm.study.runner import Evaluate, Ran, Shard, Tally, Train, run_one, state_of
from sparse_lm.train.session import train
from sparse_lm.train.signals import on_signals

# What the caller has decided about JAX goes for the tasks as well.
SETTINGS = (
    "jax_platforms",
    "jax_num_cpu_devices",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
)
POLL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Cluster:
    """address: `local` starts one on this machine, `auto` or HOST:PORT joins one. per_run: what a task reserves."""

    address: str = "local"
    per_run: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"CPU": 1.0})

    @staticmethod
    def parse(address: str, per_run: str) -> Cluster:
        """per_run: as `CPU=2,GPU=1`. Raises `ConfigError`."""
        resources: dict[str, float] = {}
        for part in per_run.split(","):
            name, _, amount = part.partition("=")
            if not name or not amount.replace(".", "", 1).isdecimal():
                raise ConfigError("per_run", per_run, "write it as CPU=2,GPU=1, with names that the cluster has")
            resources[name] = float(amount)
        return Cluster(address, resources)

    def options(self) -> dict[str, Any]:
        """What Ray calls these."""
        others = {name: amount for name, amount in self.per_run.items() if name not in ("CPU", "GPU")}
        return {
            "num_cpus": self.per_run.get("CPU", 0),
            "num_gpus": self.per_run.get("GPU", 0),
            "resources": others,
            "max_retries": 0,  # asked for, not tried again behind the caller's back
        }


def run_on_ray(
    plan: Plan,
    directory: Path,
    stream: TextIO,
    cluster: Cluster,
    choice: tuple[Shard, bool] = (Shard(), False),
    after: Callable[[], object] = lambda: None,
    work: tuple[Train, Evaluate] = (train, evaluate_run),
) -> Ran:
    """As `run_study`, with a task for each training and the evaluations of it. choice: the shard, and whether to retry.

    A signal is passed on to all tasks, which save and end; tasks that wait are dropped. A task whose process or machine
    dies counts as failed in this call, and goes on from its last checkpoint in the next. Raises `ConfigError` without
    Ray, or when no cluster answers.
    """
    stop: list[int] = []

    def handler(number: int, _: object) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append(number)

    with on_signals(handler):
        ray = _connected(cluster)
        try:
            with on_signals(handler):  # in place of Ray's own, which it leaves behind
                return _tasks(ray, (plan, directory, cluster, work), Tally(stream, after), choice, stop)
        finally:
            ray.shutdown()


def _tasks(
    ray: Any,
    what: tuple[Plan, Path, Cluster, tuple[Train, Evaluate]],
    tally: Tally,
    choice: tuple[Shard, bool],
    stop: list[int],
) -> Ran:
    """Does all that is to do, and hears of a signal by `stop`, which it fills."""
    plan, directory, cluster, work = what
    todo = set(tally.begin(plan, directory, *choice))
    jobs = [job for whole in plan.jobs if (job := [run for run in whole if run in todo])]
    settings = {name: value for name in SETTINGS if (value := jax.config.values[name]) is not None}
    task = ray.remote(**cluster.options())(run_job)
    waiting = {task.remote(job, str(directory.resolve()), settings, work): job for job in jobs}
    total = ray.cluster_resources()
    missing = [f"{name}={amount:g}" for name, amount in cluster.per_run.items() if amount > total.get(name, 0)]
    if missing and jobs:
        tally.stream.write(f"the cluster has no {', '.join(missing)} now; waiting for a machine that does\n")
    cancelled = stopped = False
    while waiting:
        if stop and not cancelled:
            cancelled = True
            for reference in waiting:
                ray.cancel(reference)
        for reference in ray.wait(list(waiting), timeout=POLL_SECONDS)[0]:
            job = waiting.pop(reference)
            ended = _ended(ray, reference, job, directory)
            stopped = stopped or len(ended) < len(job)  # also where a machine was told to stop, not this command
            for run, words in ended:
                tally.ended(run, words)
    return tally.end(stopped)


def run_job(job: Sequence[Run], directory: str, settings: Mapping[str, Any], work: tuple[Train, Evaluate]) -> list[str]:
    """In a task: runs until one is stopped; what became of those before it."""
    for name, value in settings.items():
        if jax.config.values[name] != value:
            jax.config.update(name, value)
    ended = []
    for run in job:
        stopped, words = run_one(run, Path(directory), *work)
        if stopped:
            break
        ended.append(words)
    return ended


def _ended(ray: Any, reference: Any, job: Sequence[Run], directory: Path) -> list[tuple[Run, str]]:
    """What became of the runs of a job, without those that were stopped."""
    try:
        return list(zip(job, ray.get(reference), strict=False))
    except ray.exceptions.TaskCancelledError:
        return [(run, "finished") for run in job if state_of(directory, run) == "finished"]
    except ray.exceptions.RayError as error:
        why = (
            f"failed, {type(error).__name__}: {str(error).strip().splitlines()[-1]} (the same command goes on with it)"
        )
        return [(run, "finished" if state_of(directory, run) == "finished" else why) for run in job]


def _connected(cluster: Cluster) -> Any:
    """The module, with a cluster behind it."""
    try:
        import ray
    except ImportError:
        why = "needs Ray, which is not installed: pip install -e '.[ray]'"
        raise ConfigError("ray", cluster.address, why) from None
    local: dict[str, Any] = {"include_dashboard": False} if cluster.address == "local" else {}
    try:
        ray.init(address=cluster.address, log_to_driver=False, **local)
    except (ConnectionError, RuntimeError, ValueError) as error:
        why = f"no cluster answers there ({error}); start one with `ray start --head`, or say local"
        raise ConfigError("ray", cluster.address, why) from error
    return ray
