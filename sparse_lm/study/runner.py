"""Runs what a plan holds, each run an ordinary training in a directory of its own, and never one twice.

DIR/<study>/runs/<variant>-s<seed>-<config hash>/ holds what training writes there, and beside it train.log, done.json
once it has finished, and failure.json once it has failed. Whatever ends in between is resumed from its last checkpoint.
A run that only evaluates another one's training has the same files, but for checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TextIO

import jax

from sparse_lm.config import ConfigError
from sparse_lm.experiment import Experiment
from sparse_lm.study.evaluation import evaluate_run
from sparse_lm.study.plan import Plan, Run
from sparse_lm.study.record import DONE_NAME
from sparse_lm.study.reuse import find_run
from sparse_lm.telemetry.format import duration
from sparse_lm.telemetry.sinks import METRICS_NAME, replace_file
from sparse_lm.train.loop import TrainingError
from sparse_lm.train.session import train
from sparse_lm.train.signals import on_signals

RUNS_NAME, FAILURE_NAME, LOG_NAME = "runs", "failure.json", "train.log"
State = Literal["finished", "failed", "started", "waiting"]
Train = Callable[[Experiment, Path, TextIO], Any]  # returns what `train.session.train` does, or what looks like it
Evaluate = Callable[[Run, Path, Path, TextIO], float]  # see `evaluation.evaluate_run`


class Interrupted(BaseException):
    """SIGTERM or Ctrl-C between two trainings; like KeyboardInterrupt no error, so that it is not taken for one."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """Every `count`-th job of a plan, from `index` on."""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise ConfigError("shard", f"{self.index}/{self.count}", "count from 0: the last one of n is n-1/n")

    @staticmethod
    def parse(text: str) -> Shard:
        """From `i/n`. Raises `ConfigError`."""
        index, slash, count = text.partition("/")
        if not slash or not index.isdecimal() or not count.isdecimal():
            raise ConfigError("shard", text, "write it as i/n, for example 0/8 to 7/8")
        return Shard(int(index), int(count))

    def split(self, parts: int) -> list[Shard]:
        """The shards that together do what this one does."""
        return [Shard(self.index + self.count * part, self.count * parts) for part in range(parts)]

    def of(self, jobs: tuple[tuple[Run, ...], ...]) -> tuple[Run, ...]:
        """The runs of this shard's jobs, in the order in which they have to be done."""
        return tuple(run for job in jobs[self.index :: self.count] for run in job)


@dataclasses.dataclass(frozen=True)
class Ran:
    """How a call ended: names of the runs that it finished, that failed (now or before), and whether it was stopped."""

    finished: tuple[str, ...]
    failed: tuple[str, ...]
    stopped: bool


def study_dir(plan: Plan, workdir: Path) -> Path:
    """Where a study at a scale lies: scales are different experiments, so the larger ones have their own folder."""
    return workdir / folder_name(plan.study.name, plan.scale)


def folder_name(study: str, scale: str) -> str:
    """The folder of a study at a scale."""
    return study if scale == "toy" else f"{study}-{scale}"


def run_dir(directory: Path, run: Run) -> Path:
    """The directory of a run within that of its study; see `reuse.find_run` for those of earlier versions."""
    return _found(directory, run)[0]


def _found(directory: Path, run: Run) -> tuple[Path, list[str]]:
    trained = None if run.training is None else run_dir(directory, run.training).name
    return find_run(directory / RUNS_NAME / run.name, run, trained)


def state_of(directory: Path, run: Run) -> State:
    """How far a run is."""
    here = run_dir(directory, run)
    if (here / DONE_NAME).exists():
        return "finished"
    if (here / FAILURE_NAME).exists():
        return "failed"
    return "started" if (here / METRICS_NAME).exists() else "waiting"


def failure_of(directory: Path, run: Run) -> str:
    """Why a run failed, in one line; empty when it did not."""
    path = run_dir(directory, run) / FAILURE_NAME
    return json.loads(path.read_text(encoding="utf-8"))["error"] if path.exists() else ""


def listing(plan: Plan, directory: Path, shard: Shard) -> list[str]:
    """A line for each run of the shard: its state, name and cost."""
    lines = []
    for run in shard.of(plan.jobs):
        cost = plan.costs[run.variant]
        words = f"{cost.steps} steps, {cost.parameters:,} parameters, {cost.flops_per_token:,} FLOPs/token"
        words = f"evaluates {run_dir(directory, run.training).name}" if run.training else words
        lines.append(f"{state_of(directory, run):8} {run_dir(directory, run).name}  {words}")
    return lines


def run_study(
    plan: Plan,
    directory: Path,
    stream: TextIO,
    shard: Shard = Shard(),
    retry: bool = False,
    after: Callable[[], object] = lambda: None,
    train: Train = train,
    evaluate: Evaluate = evaluate_run,
) -> Ran:
    """Runs what of the shard is not finished, and with `retry` what had failed; calls `after` whenever one ends.

    A run that fails is recorded and the others go on. SIGTERM or Ctrl-C save the running one and end the call.
    """
    tally = Tally(stream, after)
    try:
        with on_signals(_interrupt):
            for run in tally.begin(plan, directory, shard, retry):
                stopped, words = run_one(run, directory, train, evaluate)
                if stopped:
                    return tally.end(stopped=True)
                tally.ended(run, words)
    except Interrupted:
        return tally.end(stopped=True)
    return tally.end(stopped=False)


class Tally:
    """What a call has to do and has done, told on a stream; calls `after` whenever a run has ended."""

    def __init__(self, stream: TextIO, after: Callable[[], object]):
        self.stream, self.after = stream, after
        self.todo: list[Run] = []
        self.finished: list[str] = []
        self.failed: list[str] = []
        self.done, self.start = 0, time.monotonic()

    def begin(self, plan: Plan, directory: Path, shard: Shard, retry: bool) -> list[Run]:
        """What of the shard is to do, in order: what is not finished, and with `retry` what had failed."""
        mine = shard.of(plan.jobs)
        states = [state_of(directory, run) for run in mine]
        wanted = ("waiting", "started", "failed") if retry else ("waiting", "started")
        self.todo = [run for run, state in zip(mine, states, strict=True) if state in wanted]
        if not retry:
            self.failed = [run.name for run, state in zip(mine, states, strict=True) if state == "failed"]
        self.stream.write(
            f"{len(mine)} runs: {states.count('finished')} finished before, {len(self.failed)} failed before, "
            f"{len(self.todo)} to do\n"
        )
        for name in self.failed:
            self.stream.write(f"  failed before: {name} (--retry tries it again)\n")
        for run in self.todo:
            self.stream.writelines(f"  {run.name} is to do: {why}\n" for why in _found(directory, run)[1])
        return self.todo

    def ended(self, run: Run, words: str) -> None:
        """One has finished or failed."""
        (self.failed if words.startswith("failed") else self.finished).append(run.name)
        self.done += 1
        rest = (time.monotonic() - self.start) / self.done * (len(self.todo) - self.done)
        self.stream.write(f"[{self.done}/{len(self.todo)}] {run.name}: {words}; {duration(rest)} to go\n")
        self.stream.flush()
        self.after()

    def end(self, stopped: bool) -> Ran:
        """Nothing more is done."""
        if stopped:
            self.stream.write("stopped by a signal; the same command goes on from there\n")
        return Ran(tuple(self.finished), tuple(self.failed), stopped)


def run_one(run: Run, directory: Path, train: Train = train, evaluate: Evaluate = evaluate_run) -> tuple[bool, str]:
    """Trains or evaluates one run; whether it was stopped by a signal, and what became of it in words.

    Raises `ConfigError` when its directory cannot be written. Whatever else goes wrong is recorded there.
    """
    here = run_dir(directory, run)
    try:
        here.mkdir(parents=True, exist_ok=True)
        (here / FAILURE_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError("workdir", str(here), f"cannot be written ({error}); choose another directory") from error
    start = time.monotonic()
    with (here / LOG_NAME).open("a", encoding="utf-8") as log:
        try:
            stopped, loss = _do(run, directory, log, train, evaluate)
        except Exception as error:  # whatever it is, the other runs go on and the table says what is missing
            lines = str(error).strip().splitlines()
            words = f"{type(error).__name__}: {lines[0] if lines else ''}"
            log.write(traceback.format_exc())
            _record(here / FAILURE_NAME, {"error": words, "time": time.strftime("%Y-%m-%dT%H:%M:%S")})
            return False, f"failed, {words} (see {here / LOG_NAME})"
    if stopped:
        return True, "stopped"
    seconds = time.monotonic() - start
    _record(here / DONE_NAME, {"key": run.key, "seconds": seconds, "time": time.strftime("%Y-%m-%dT%H:%M:%S")})
    shown = "finished before" if loss is None else f"validation loss {loss:.4f}"
    return False, f"{shown}, {duration(seconds)}"


def _do(run: Run, directory: Path, log: TextIO, train: Train, evaluate: Evaluate) -> tuple[bool, float | None]:
    """Whether it was stopped, and the validation loss."""
    here = run_dir(directory, run)
    if run.training is None:
        outcome = train(run.experiment, here, log).outcome
        return outcome.stopped, outcome.last.get("validation", {}).get("loss")
    state = state_of(directory, run.training)
    if state != "finished":
        raise TrainingError(f"its training {run.training.name} is {state}; it is evaluated once that has finished")
    return False, evaluate(run, run_dir(directory, run.training), here, log)


def _record(path: Path, content: dict[str, object]) -> None:
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


def _interrupt(number: int, _: object) -> None:
    """Between trainings, which have handlers of their own, the first signal ends the study at once."""
    raise Interrupted(number)


def keep_programs(directory: Path) -> None:
    """Keeps compiled programs, which seeds of a variant share, in `directory`/cache, unless they are kept elsewhere."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str((directory / "cache").resolve()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
