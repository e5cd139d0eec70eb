"""A run on disk whose checkpoints hold untrained models: what the tests of the analysis look into."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from sparse_lm.analysis.run import Analysis, InFeedForward
from sparse_lm.batch import Batch
from sparse_lm.config import to_dict
from sparse_lm.data.loader import build_dataset, validation_batches
from sparse_lm.experiment import Experiment, resolved
from sparse_lm.models.decoder import Decoder, build_decoder
from sparse_lm.moe.types import TokenChoice
from sparse_lm.sharding import DEFAULT
from sparse_lm.train.checkpoint import Checkpoints

CONFIG = tiny.experiment(
    model__moe__every=1, model__moe__capacity_factor_eval=0.9, checkpoint__keep=9, checkpoint__asynchronous=False
)
DATASET = build_dataset(CONFIG.data, CONFIG.seed)
BATCHES = validation_batches(DATASET, 8, 2)


def config(**changes: Any) -> Experiment:
    """The tiny run with two sparse layers, resolved."""
    return resolved(CONFIG.replace(**changes), DATASET.vocab_size)


def model(seed: int = 0, **changes: Any) -> Decoder:
    """An untrained model of it."""
    return build_decoder(jax.random.key(seed), config(**changes).model, DEFAULT)


def write_run(workdir: pathlib.Path, seeds: dict[int, int], fingerprint: str | None = None, **changes: Any):
    """A run whose checkpoint of each step holds the model of that seed."""
    workdir.mkdir(exist_ok=True)
    described = {"config": to_dict(config(**changes)), "data": {"fingerprint": fingerprint or DATASET.fingerprint}}
    (workdir / "config.json").write_text(json.dumps(described))
    with Checkpoints(workdir / "checkpoints", CONFIG.checkpoint) as checkpoints:
        for step, seed in seeds.items():
            checkpoints.save(step, {"model": model(seed, **changes)}, {}, loss=float(step), force=True)
    return workdir


def inside(found: Analysis) -> InFeedForward:
    """What was found of the feed-forward experts, which have to be there."""
    assert found.feed_forward is not None
    return found.feed_forward


def choice(expert: Any, gate: Any = None) -> TokenChoice:
    """Decisions written out; gates of 0.5 unless given."""
    expert = jnp.asarray(expert, jnp.int32)
    gate = np.where(np.asarray(expert) >= 0, 0.5, 0.0) if gate is None else gate
    return TokenChoice(expert, jnp.asarray(gate, jnp.float32))


def batch(tokens: Any, segments: Any, positions: Any = None, domains: Any = None) -> Batch:
    """Rows written out."""
    columns = [np.asarray(tokens, np.int32), np.asarray(segments, np.int32)]
    others = [np.zeros_like(columns[0]) if x is None else np.asarray(x, np.int32) for x in (positions, domains)]
    return Batch(*columns, others[0], np.ones_like(columns[0]), others[1])  # type: ignore[arg-type]
