"""A run so small that it takes seconds, which the tests of training, evaluation and the mains share."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any, TextIO

import jax

from sparse_lm.data.config import DataConfig, GrammarConfig
from sparse_lm.data.loader import build_dataset
from sparse_lm.experiment import Experiment, resolved
from sparse_lm.mesh import make_mesh
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.counts import count
from sparse_lm.moe.config import MoEConfig
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import CheckpointConfig, TrainConfig
from sparse_lm.train.loop import Outcome, Trainer

GRAMMAR = GrammarConfig(num_domains=2, num_symbols=8, branching=3, document_length=32, num_documents=64)


def experiment(**changes: Any) -> Experiment:
    """Two layers, one of them sparse with four experts, on a small grammar; see `Config.replace` for `changes`."""
    moe = MoEConfig(num_experts=4, top_k=2, d_expert=8, capacity_factor=1.0, priority="token")
    return Experiment(
        model=ModelConfig(num_layers=2, d_model=16, num_heads=4, d_ff=16, dropout=0.1, moe=moe),
        data=DataConfig(source="grammar", length=16, validation_fraction=0.1, grammar=GRAMMAR),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=2),
        train=TrainConfig(steps=12, batch_size=8, eval_every=5, eval_batches=2),
        checkpoint=CheckpointConfig(every=4),
    ).replace(**changes)


def trainer(config: Experiment, workdir: Path, devices: int = 1) -> Trainer:
    """A trainer on the first `devices` devices. Run it under `jax.set_mesh(trainer.mesh)`."""
    dataset = build_dataset(config.data, config.seed)
    mesh = make_mesh(config.mesh_sizes(devices), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        return Trainer(resolved(config, dataset.vocab_size), dataset, workdir, mesh)


def run(config: Experiment, workdir: Path, devices: int = 1) -> Outcome:
    """Trains in `workdir`, or goes on there."""
    return finish(trainer(config, workdir, devices))


def rows(workdir: Path, split: str = "train") -> list[dict[str, Any]]:
    """The rows of a split, in the order of the file."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def losses(workdir: Path) -> list[float]:
    """The training losses; fails unless every step from 1 stands there once, in order."""
    found = rows(workdir)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return [row["loss"] for row in found]


def stopping(made: Trainer, after: int) -> Trainer:
    """The trainer, which gets a SIGTERM while its step number `after` is computed."""
    step = made.step

    def stop(state, batch, key):
        if int(state.step) == after - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, batch, key)

    made.step = stop
    return made


def finish(made: Trainer, stream: TextIO | None = None) -> Outcome:
    """Runs a trainer on its mesh."""
    with jax.set_mesh(made.mesh):
        return made.run(stream or io.StringIO(), count(made.experiment.model))
