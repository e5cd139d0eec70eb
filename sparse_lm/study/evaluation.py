"""A trained run evaluated in another way: its last checkpoint, on the same held-out rows, with other options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TextIO

import jax

from sparse_lm.data.loader import build_dataset, validation_batches
from sparse_lm.evals.perplexity import make_evaluate
from sparse_lm.experiment import resolved
from sparse_lm.mesh import make_mesh
from sparse_lm.sharding import put
from sparse_lm.study.plan import Run
from sparse_lm.telemetry.rundata import load_run
from sparse_lm.telemetry.sinks import METRICS_NAME, plain, replace_file
from sparse_lm.train.loop import TrainingError
from sparse_lm.train.restore import load_model
from sparse_lm.train.rows import validation_row
from sparse_lm.train.run import check_resumable, describe_run, read_info, write_info


def evaluate_run(run: Run, trained: Path, here: Path, stream: TextIO) -> float:
    """Evaluates the checkpoint in `trained` as the run's experiment says; returns the loss in nats per token.

    Writes what a training would have in `here`: config.json, and metrics.jsonl with the rows of the training and one
    evaluation. Raises `TrainingError` when the training has not ended, `ConfigError` when it is another one or its data
    have changed, and `CheckpointError` when its checkpoint is gone, damaged or of another shape.
    """
    assert run.training is not None
    info = read_info(trained)
    if info is None:
        raise TrainingError(f"its training {run.training.name} has not begun; run that first")
    dataset = build_dataset(run.experiment.data, run.seed)
    experiment = resolved(run.experiment, dataset.vocab_size)
    check_resumable(info, resolved(run.training.experiment, dataset.vocab_size), dataset.fingerprint)
    mesh = make_mesh(experiment.mesh_sizes(jax.device_count()))
    with jax.set_mesh(mesh):
        loaded = load_model(trained, model=experiment.model)
        if loaded.step != experiment.train.steps:
            raise TrainingError(f"its training {run.training.name} is at step {loaded.step}; let it end first")
        held_out = validation_batches(dataset, experiment.train.batch_size, experiment.train.eval_batches)
        batches = [jax.tree.map(lambda x: put(mesh, experiment.sharding.rules, x, "B."), batch) for batch in held_out]
        evaluation = make_evaluate(dataset.domains, experiment.train.accumulate)(loaded.model, batches)
    row = validation_row(loaded.step, evaluation, dataset.validation_bytes_per_target, dataset.entropy)
    before = load_run(trained)
    write_info(here, describe_run(experiment, dataset, before.info["parameters"]) | {"evaluates": trained.name})
    rows = [json.dumps(plain(one), allow_nan=False) for one in (*before.train, row)]
    replace_file(here / METRICS_NAME, "".join(f"{one}\n" for one in rows).encode())
    stream.write(f"{run.training.name} at step {loaded.step}: validation loss {evaluation.loss:.4f} nats/token\n")
    return evaluation.loss
