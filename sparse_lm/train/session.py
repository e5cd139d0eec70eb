"""One call from an experiment to a trained model and its report: for `experiments/train.py` and for notebooks."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any, TextIO

import jax

from sparse_lm.data.loader import Dataset, build_dataset
from sparse_lm.experiment import Experiment, resolved
from sparse_lm.mesh import make_mesh
from sparse_lm.models.counts import Counts, count, table
from sparse_lm.telemetry.report import REPORT_NAME, write_report
from sparse_lm.telemetry.rundata import CONFIG_NAME, load_run, verdict
from sparse_lm.train.hosts import agree, is_first, see
from sparse_lm.train.loop import Outcome, Trainer
from sparse_lm.train.run import check_resumable, describe_run, read_info, write_info


@dataclasses.dataclass(frozen=True)
class Session:
    """A finished or stopped training: what came out, what it was made with, and where its report is."""

    experiment: Experiment
    dataset: Dataset
    outcome: Outcome
    report: Path


def train(experiment: Experiment, workdir: Path, stream: TextIO) -> Session:
    """Trains in `workdir`, or goes on with what is there, and writes its report; tells about it on `stream`.

    Every process of a training over several hosts calls it; the first one writes, tells and reports for all of them.
    Everything that can be refused is refused before the first compilation. Raises `ConfigError` (a configuration that
    cannot run, or another run's directory), `DataError`, `CheckpointError` and `TrainingError`.
    """
    first = is_first()
    stream = stream if first else io.StringIO()
    sizes = experiment.mesh_sizes(jax.device_count())
    dataset = build_dataset(experiment.data, experiment.seed if experiment.data_seed is None else experiment.data_seed)
    experiment = resolved(experiment, dataset.vocab_size)
    experiment.mesh_sizes(jax.device_count())
    stored = read_info(workdir)
    agree({"config": experiment, "data": dataset.fingerprint, "workdir": stored})
    if stored is not None:
        check_resumable(stored, experiment, dataset.fingerprint)
    counts = count(experiment.model)
    _introduce(experiment, dataset, counts, sizes, stream)
    if first:
        write_info(workdir, describe_run(experiment, dataset, _parameters(counts, experiment)))
    see(workdir / CONFIG_NAME)
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        outcome = Trainer(experiment, dataset, workdir, mesh).run(stream, counts)
    report = workdir / REPORT_NAME
    if first:
        write_report(workdir)
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
