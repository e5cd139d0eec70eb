"""The training loop: data in, checkpoints and metrics out, from wherever the directory's last checkpoint is."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, TextIO

import jax
from jax.sharding import Mesh

from sparse_lm.batch import Batch
from sparse_lm.data.loader import Dataset, TrainLoader, validation_batches
from sparse_lm.evals.perplexity import make_evaluate
from sparse_lm.experiment import Experiment
from sparse_lm.models.counts import Counts
from sparse_lm.models.decoder import Decoder
from sparse_lm.optim.build import build_optimizer
from sparse_lm.optim.schedules import schedule
from sparse_lm.telemetry.clock import Clock
from sparse_lm.telemetry.peak import device_peak
from sparse_lm.telemetry.progress import Progress, Status
from sparse_lm.telemetry.sinks import Sinks, open_sinks
from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.hosts import agree, is_first, place, process_rows, stop_requests
from sparse_lm.train.rows import train_row, validation_row
from sparse_lm.train.run import CHECKPOINTS_NAME
from sparse_lm.train.state import TrainState, create_state, state_shapes
from sparse_lm.train.step import StepMetrics, make_train_step

LAYER_ROWS = 200  # about so many rows of a run carry the arrays per layer and expert


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, and which checkpoint is the last good one."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """step: steps taken in all. resumed_from: the checkpoint that this process began with, or None.

    stopped: by a signal, before the last step. last: the newest row of each split that this process wrote.
    """

    model: Decoder
    step: int
    resumed_from: int | None
    stopped: bool
    last: dict[str, dict[str, Any]]


class Trainer:
    """One process's part in the training of one run."""

    def __init__(self, experiment: Experiment, dataset: Dataset, workdir: Path, mesh: Mesh):
        """experiment: resolved. Call under `jax.set_mesh(mesh)`."""
        self.experiment, self.dataset, self.workdir, self.mesh = experiment, dataset, workdir, mesh
        self.rules, train = experiment.sharding.rules, experiment.train
        self.optimizer = build_optimizer(experiment.optim, train.steps)
        self.schedule = schedule(experiment.optim, train.steps)
        self.step = make_train_step(self.optimizer, train.accumulate, len(dataset.domains), train.pipeline_microbatches)
        self.evaluate = make_evaluate(dataset.domains, train.accumulate)
        seed = experiment.seed if experiment.data_seed is None else experiment.data_seed
        self.rows = process_rows(mesh, self.rules, train.batch_size)
        self.loader = TrainLoader(dataset, train.batch_size, seed, rows=self.rows)
        self.root = jax.random.key(experiment.seed)
        held_out = validation_batches(dataset, train.batch_size, train.eval_batches, self.rows)
        self.validation = [self._put(batch) for batch in held_out]

    def run(self, stream: TextIO, counts: Counts) -> Outcome:
        """Trains to the last step, or until SIGTERM or Ctrl-C, which save first; shows progress on `stream`.

        Raises `TrainingError` after too many non-finite steps in a row, and `CheckpointError`.
        """
        train = self.experiment.train
        with Checkpoints(self.workdir / CHECKPOINTS_NAME, self.experiment.checkpoint) as checkpoints:
            resumed = checkpoints.latest_step()
            agree({"checkpoint": resumed})
            state, extra = self._start(checkpoints, resumed)
            first = resumed or 0
            # Also without a checkpoint: a run that was killed before its first one has left rows behind.
            sinks = open_sinks(self.workdir, is_first(), resume_step=first)
            clock = Clock(train.steps, seconds_before=extra.get("seconds", 0.0))
            progress = Progress(train.steps, stream, active=is_first())
            with contextlib.closing(sinks), progress, stop_requests() as stop:
                if resumed is not None:
                    done = "finished" if resumed >= train.steps else "resuming"
                    progress.message(f"checkpoint of step {resumed} found in {self.workdir}: {done}")
                recorder = Recorder(self, (sinks, clock, progress), counts, first)
                step = first
                while step < train.steps and not stop(step):
                    with clock.measure("data"):
                        batch = self._put(self.loader.batch_at(step))
                    with clock.pause("compile") if step == first else clock.measure("step"):
                        state, metrics = self.step(state, batch, self.root)
                        if step == first:
                            jax.block_until_ready(metrics)
                    step += 1
                    # The row of the step before is made while the devices work on this one.
                    recorder.flush()
                    recorder.pending = (step, metrics)
                    self._look(state, step, recorder, checkpoints)
                stopped = step < train.steps
                if stopped:
                    # Only saved, not evaluated: who sends the signal may not wait long.
                    self._save(state, step, None, recorder, checkpoints)
                    progress.message(f"stopped by a signal at step {step}; the same command goes on from there")
        return Outcome(state.model, step, resumed, stopped, recorder.last)

    def _start(self, checkpoints: Checkpoints, step: int | None) -> tuple[TrainState, dict[str, Any]]:
        made_of = self.experiment.model, self.optimizer, self.rules
        if step is None:
            return jax.jit(lambda key: create_state(key, *made_of))(self.root), {}
        state, extra = checkpoints.restore(state_shapes(self.root, *made_of, self.mesh))
        self.loader.restore(extra["data"])
        return state, extra

    def _look(self, state: TrainState, step: int, recorder: Recorder, checkpoints: Checkpoints) -> None:
        """Evaluates and saves where it is time to, and in the end."""
        train, loss = self.experiment.train, None
        last = step == train.steps
        if step % train.eval_every == 0 or last:
            recorder.flush()
            with recorder.clock.pause("evaluation"):
                evaluation = self.evaluate(state.model, self.validation)
            loss = evaluation.loss
            recorder.write(
                validation_row(step, evaluation, self.dataset.validation_bytes_per_target, self.dataset.entropy)
            )
        checkpoints.raise_errors()
        if last or step % self.experiment.checkpoint.every == 0:
            self._save(state, step, loss, recorder, checkpoints)

    def _save(
        self, state: TrainState, step: int, loss: float | None, recorder: Recorder, checkpoints: Checkpoints
    ) -> None:
        """Saves the state, if this process has changed it, with all rows up to it written."""
        recorder.flush()
        if step == recorder.first:
            return
        with recorder.clock.pause("checkpoint"):
            data = self.loader.state() | {"step": step}
            checkpoints.save(step, state, {"data": data, "seconds": recorder.clock.seconds}, loss, force=True)

    def _put(self, batch: Batch) -> Batch:
        size = self.experiment.train.batch_size
        return jax.tree.map(lambda x: place(self.mesh, self.rules, x, self.rows, size), batch)


class Recorder:
    """Turns step metrics into rows, progress and, when the loss is lost, an end."""

    def __init__(self, trainer: Trainer, outputs: tuple[Sinks, Clock, Progress], counts: Counts, first: int):
        experiment = trainer.experiment
        self.experiment, self.schedule = experiment, trainer.schedule
        (self.sinks, self.clock, self.progress), self.first = outputs, first
        self.last: dict[str, dict[str, Any]] = {}
        self.pending: tuple[int, StepMetrics] | None = None
        train = experiment.train
        self.tokens = train.batch_size * experiment.data.length
        # A multiple of log_every, lest the two never meet.
        self.layers_every = max(1, train.steps // (LAYER_ROWS * train.log_every)) * train.log_every
        # Virtual CPU devices share the cores that the peak was measured on.
        devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
        peak = device_peak(experiment.model.dtype).flops_per_second * devices
        self.mfu_per_rate = counts.flops_per_token(experiment.data.length) / peak

    def flush(self) -> None:
        """Waits for the pending step, if there is one, and records it."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        with self.clock.measure("step"):
            metrics = jax.device_get(metrics)
        if step > self.first + 1:  # the first step is mostly compilation
            self.clock.step_done(self.tokens)
        train = self.experiment.train
        lost = int(metrics.nonfinite_in_a_row) >= train.max_nonfinite
        rate = self.clock.tokens_per_second
        if step % train.log_every == 0 or step == train.steps or lost:
            row = train_row(step, metrics, layers=step % self.layers_every == 0)
            self.write(
                row
                | {
                    "learning_rate": float(jax.numpy.asarray(self.schedule(step - 1))),
                    "tokens_per_second": rate,
                    "mfu": None if rate is None else rate * self.mfu_per_rate,
                    "step_seconds": self.clock.step_seconds,
                    "seconds": self.clock.seconds,
                }
            )
        if lost:
            raise TrainingError(
                f"the last {train.max_nonfinite} steps up to {step} had a non-finite loss or gradient and were "
                "skipped; the checkpoints before are intact. Lower optim.learning_rate, or raise train.max_nonfinite"
            )
        row = self.last.get("train", {})
        self.progress.update(
            Status(
                step,
                loss=float(metrics.parts.loss),
                tokens_per_second=rate,
                eta_seconds=self.clock.eta(step),
                dropped_fraction=None if metrics.parts.stats is None else row.get("dropped_fraction"),
                max_violation=row.get("max_violation"),
            )
        )

    def write(self, row: dict[str, Any]) -> None:
        """Records a row, and tells of an evaluation."""
        self.last[row["split"]] = row
        self.sinks.append(row)
        if row["split"] == "validation":
            bits = row["bits_per_byte"]
            self.progress.message(
                f"step {row['step']}: validation loss {row['loss']:.4f} nats/token"
                + (f", {bits:.4f} bits/byte" if bits is not None else "")
                + (f", {row['entropy_gap']:.4f} above the best possible" if row["entropy_gap"] is not None else "")
            )
