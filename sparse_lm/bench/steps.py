"""The compiled train step of a sparse model against that of its dense twin, on all devices."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from sparse_lm.batch import Batch
from sparse_lm.bench.harness import Comparison, Options, paired
from sparse_lm.experiment import Experiment, resolved
from sparse_lm.mesh import make_mesh
from sparse_lm.models.counts import count, dense_twin
from sparse_lm.optim.build import build_optimizer
from sparse_lm.sharding import put
from sparse_lm.telemetry.peak import matmul_peak
from sparse_lm.train.restore import tokenizer_of
from sparse_lm.train.state import create_state
from sparse_lm.train.step import make_train_step

REPEATS, QUICK_REPEATS = 15, 3


def train_step(options: Options) -> list[Comparison]:
    """One row: the experiment against its dense twin. The share of the peak is the MFU, against the measured peak.

    Trains from fresh weights on random tokens, each row one document: the time of a step hardly depends on the text.
    Raises `ConfigError` when the model is dense or has no twin, or does not fit the devices.
    """
    sparse = resolved(options.experiment, tokenizer_of(options.experiment.data).vocab_size)
    dense = sparse.replace(model=dense_twin(sparse.model))
    mesh = make_mesh(sparse.mesh_sizes(jax.device_count()))
    # Virtual CPU devices share the cores that the peak is measured on.
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    peak = matmul_peak(sparse.model.dtype) * devices
    with jax.set_mesh(mesh):
        repeats = options.repeats or (QUICK_REPEATS if options.quick else REPEATS)
        times = paired(stepper(sparse, mesh), stepper(dense, mesh), repeats)
    peak = max(peak, matmul_peak(sparse.model.dtype) * devices)
    tokens, length = sparse.train.batch_size * sparse.data.length, sparse.data.length
    moe = sparse.model.moe
    return [
        Comparison(
            case=f"E={moe.num_experts} k={moe.top_k} {moe.dispatcher}" if moe else "",
            against="dense twin",
            paired=times,
            tokens=tokens,
            flops=tokens * count(sparse.model).flops_per_token(length),
            flops_against=tokens * count(dense.model).flops_per_token(length),
            peak=peak,
        )
    ]


def stepper(experiment: Experiment, mesh: Mesh) -> Callable[[], float]:
    """A function that takes one more train step and returns its loss. Call both under `jax.set_mesh(mesh)`."""
    train, model = experiment.train, experiment.model
    optimizer = build_optimizer(experiment.optim, train.steps)
    root = jax.random.key(experiment.seed)
    state = jax.jit(lambda key: create_state(key, model, optimizer, experiment.sharding.rules))(root)
    step = make_train_step(optimizer, train.accumulate, 1)
    batch = jax.tree.map(lambda x: put(mesh, experiment.sharding.rules, x, "B."), random_batch(experiment))

    def call() -> float:
        nonlocal state
        state, metrics = step(state, batch, root)
        jax.block_until_ready(state)
        return float(metrics.parts.loss)

    return call


def random_batch(experiment: Experiment) -> Batch:
    """Random tokens of the resolved experiment's vocabulary; each row is one document and all of it is a target."""
    shape = (experiment.train.batch_size, experiment.data.length + 1)
    tokens = np.random.default_rng(experiment.seed).integers(0, experiment.model.vocab_size, shape)
    ones, zeros = np.ones(shape, np.int32), np.zeros(shape, np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return Batch(tokens.astype(np.int32), ones, positions, ones, zeros)  # type: ignore[arg-type]
