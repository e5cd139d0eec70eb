"""One call from an experiment to a trained model and its report: for `experiments/train.py` and for notebooks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TextIO

import jax

from sparse_lm.data.loader import Dataset, build_dataset
from sparse_lm.experiment import Experiment, resolved
from sparse_lm.models.counts import Counts, count, table
from sparse_lm.sharding import make_mesh
from sparse_lm.telemetry.report import write_report
from sparse_lm.telemetry.rundata import load_run, verdict
from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.loop import Outcome, Trainer
from sparse_lm.train.run import CHECKPOINTS_NAME, check_resumable, describe_run, read_info, write_info


@dataclasses.dataclass(frozen=True)
class Session:
    """A finished or stopped training: what came out, and what it was made with."""

    experiment: Experiment
    dataset: Dataset
    outcome: Outcome
    report: Path


def train(experiment: Experiment, workdir: Path, stream: TextIO) -> Session:
    """Trains in `workdir`, or goes on with what is there, and writes its report; tells about it on `stream`.

    Everything that can be refused is refused before the first compilation. Raises `ConfigError` (a configuration that
    cannot run, or another run's directory), `DataError`, `CheckpointError` and `TrainingError`.
    """
    sizes = experiment.mesh_sizes(jax.device_count())
    dataset = build_dataset(experiment.data, experiment.seed if experiment.data_seed is None else experiment.data_seed)
    experiment = resolved(experiment, dataset.vocab_size)
    experiment.mesh_sizes(jax.device_count())
    stored = read_info(workdir)
    if stored is not None:
        check_resumable(stored, experiment, dataset.fingerprint)
    counts = count(experiment.model)
    _introduce(experiment, dataset, counts, sizes, stream)
    write_info(workdir, describe_run(experiment, dataset, _parameters(counts, experiment)))
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        with Checkpoints(workdir / CHECKPOINTS_NAME, experiment.checkpoint, read_only=False) as checkpoints:
            found = checkpoints.latest_step()
        if found is not None:
            done = found >= experiment.train.steps
            stream.write(f"checkpoint of step {found} found in {workdir}: {'finished' if done else 'resuming'}\n")
        outcome = Trainer(experiment, dataset, workdir, mesh).run(stream, counts)
    report = write_report(workdir)
    _conclude(workdir, report, stream)
    return Session(experiment, dataset, outcome, report)


def _introduce(experiment: Experiment, dataset: Dataset, counts: Counts, sizes: dict[str, int], stream: TextIO) -> None:
    stream.write(f"data ({experiment.data.source}): " + "\n".join(dataset.report.lines()) + "\n")
    stream.write(table(experiment.model, experiment.data.length) + "\n")
    mesh = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one"
    device = jax.devices()[0]
    stream.write(f"devices: {mesh} ({device.device_kind or device.platform})\n")
    stream.flush()


def _parameters(counts: Counts, experiment: Experiment) -> dict[str, Any]:
    flops = counts.flops_per_token(experiment.data.length)
    return {"total": counts.total, "active": counts.active, "flops_per_token": flops}


def _conclude(workdir: Path, report: Path, stream: TextIO) -> None:
    result = verdict(load_run(workdir))
    parts = []
    if result.train_loss is not None:
        parts.append(f"training loss {result.train_loss:.4f} nats/token (mean of the last {result.averaged} steps)")
    if result.validation_loss is not None:
        parts.append(f"validation loss {result.validation_loss:.4f} nats/token")
    if result.bits_per_byte is not None:
        parts.append(f"{result.bits_per_byte:.4f} bits/byte")
    if result.entropy_gap is not None:
        parts.append(f"{result.entropy_gap:.4f} above the best possible")
    stream.write("; ".join(parts) + "\n")
    stream.write(f"results in {workdir}: report {report}, metrics.jsonl, tensorboard/, checkpoints/\n")
    stream.flush()
