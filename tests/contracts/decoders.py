"""Small decoders and batches for the contracts of whole models."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from harness import on_mesh

from sparse_lm.batch import Batch
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.decoder import Decoder, build_decoder
from sparse_lm.moe.config import MoEConfig
from sparse_lm.sharding import DEFAULT, Rules
from sparse_lm.train.accumulate import loss_and_gradients
from sparse_lm.train.state import create_state
from sparse_lm.train.step import make_train_step

ROWS, LENGTH, VOCAB, DOMAINS = 16, 8, 16, 2


def decoder_config(moe: MoEConfig | None, **options: Any) -> ModelConfig:
    """Two sparse layers with grouped-query attention."""
    options = {"num_layers": 2, "d_model": 8, "num_heads": 4, "num_kv_heads": 2, "d_ff": 8, **options}
    return ModelConfig(vocab_size=VOCAB, moe=moe, **options)


def causal_moe(top_k: int = 2, **options: Any) -> MoEConfig:
    """Sparse layers that drop and stay causal."""
    router = {"renormalise": "after_drop"} if top_k > 1 else {}
    return cases.moe(top_k, router, **{"priority": "token", **options})


@functools.cache
def host_batch() -> Batch:
    """Packed rows: two documents in most of them, padding at the end of some, one row of padding alone."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB - 1, (ROWS, LENGTH + 1)).astype(np.int32)
    segments, positions = np.ones_like(tokens), np.zeros_like(tokens)
    for row in range(ROWS):
        cut, end = rng.integers(2, LENGTH), LENGTH + 1 - (row % 4 == 1) * rng.integers(1, 4)
        segments[row, cut:], segments[row, end:] = 2, 0
        positions[row, :cut], positions[row, cut:] = np.arange(cut), np.arange(LENGTH + 1 - cut)
    segments[6] = 0
    targets = (rng.random(tokens.shape) < 0.8).astype(np.int32)
    domains = np.broadcast_to((np.arange(ROWS) % DOMAINS)[:, None], tokens.shape).astype(np.int32)
    return Batch(tokens, segments, positions, targets, domains)  # type: ignore[arg-type]


def placed(batch: Batch) -> Batch:
    """The batch on the mesh that is set."""
    return jax.tree.map(lambda x: DEFAULT.constrain(jnp.asarray(x), "B."), batch)


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Leaves by path, on the host."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def gradients(config: ModelConfig, number: int = 1, batch: Batch | None = None) -> dict[str, np.ndarray]:
    """Total loss, parts and gradients of one batch cut into `number` microbatches, without a mesh, by name."""
    model = build_decoder(jax.random.key(0), config, DEFAULT)
    function = jax.jit(loss_and_gradients, static_argnums=(3, 4))
    total, parts, grads = function(model, placed(batch or host_batch()), jax.random.key(1), number, DOMAINS)
    return flat({"total": total, "parts": parts, "gradients": grads})


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """What some steps of training gave. metrics: of the last step. programs: how many were compiled for the step."""

    metrics: dict[str, np.ndarray]
    state: dict[str, np.ndarray]
    programs: int


def train(
    config: ModelConfig,
    mesh: jax.sharding.Mesh | None,
    accumulate: int = 1,
    times: int = 1,
    steps: int = 2,
    rules: Rules = DEFAULT,
    in_flight: int | None = None,
) -> list[Trajectory]:
    """The same training, `times` times over, by one step function. The momentum in the state is made of gradients."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    step = make_train_step(optimizer, accumulate, DOMAINS, in_flight)
    create = jax.jit(create_state, static_argnums=(1, 2, 3))
    results = []
    with on_mesh(mesh):
        batch = placed(host_batch())
        for _ in range(times):
            state = create(jax.random.key(0), config, optimizer, rules)
            metrics = None
            for _ in range(steps):
                state, metrics = step(state, batch, jax.random.key(1))
            results.append(Trajectory(flat(metrics), flat(state), step._cache_size()))  # type: ignore[attr-defined]
    return results


def forward(config: ModelConfig, training: bool, model: Decoder | None = None):
    """`logits(tokens, segments, positions)`, compiled once; in training always with the same noise."""
    model = model or build_decoder(jax.random.key(0), config, DEFAULT)
    graph, state = nnx.split(model)

    def logits(state, tokens, segments, positions):
        key = jax.random.key(3) if training else None
        return nnx.merge(graph, state)(tokens, segments, positions, key)[0]

    compiled = jax.jit(logits)
    return lambda *arrays: np.asarray(compiled(state, *(jnp.asarray(x) for x in arrays)))


def earlier_changes(config: ModelConfig, training: bool) -> int:
    """How many logits of earlier tokens change in any bit when a later token of the row changes."""
    logits = forward(config, training)
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH))
    segments, positions = np.ones_like(tokens), np.broadcast_to(np.arange(LENGTH), tokens.shape)
    before, changed = logits(tokens, segments, positions), 0
    for place in range(1, LENGTH):
        other = tokens.copy()
        other[:, place:] = rng.integers(0, VOCAB, other[:, place:].shape)
        after = logits(other, segments, positions)
        changed += int(np.sum(after[:, :place].view(np.int32) != before[:, :place].view(np.int32)))
        assert np.any(after[:, place:] != before[:, place:])
    return changed
