"""What routers decide about held-out tokens, laid flat: one entry for each real token, whatever the grouping was."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from sparse_lm.batch import Batch
from sparse_lm.config import ConfigError
from sparse_lm.evals.routing import record, record_attention
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.decoder import Decoder
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.layer import rows_together
from sparse_lm.moe.types import TokenChoice

ROWS = 8  # of a batch, or as many more as have to stay together


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """The real tokens of some rows. id_M: token ids. domain_M: of the data. position_M: in the document's part, from 0.

    part_M: number of the part of a document that the token belongs to, from 0 and without gaps; a part never spans
    rows. Padding is left out.
    """

    id_M: Int[np.ndarray, "M"]
    domain_M: Int[np.ndarray, "M"]
    position_M: Int[np.ndarray, "M"]
    part_M: Int[np.ndarray, "M"]


@dataclasses.dataclass(frozen=True, eq=False)
class Observed:
    """Tokens, and which of the `num_experts` experts each has in every sparse layer.

    expert_NMK: the experts, -1 is none. gate_NMK: their gates before drops. decisions: the same as the model hands
    them out, one for each batch. dropped_NP, routed_NP: assignments by the place in the routing group, in equal bins.
    """

    tokens: Tokens
    expert_NMK: Int[np.ndarray, "N M K"]
    gate_NMK: Float[np.ndarray, "N M K"]
    num_experts: int
    decisions: tuple[TokenChoice, ...]
    routed_NP: Int[np.ndarray, "N P"]
    dropped_NP: Int[np.ndarray, "N P"]


def check_sparse(model: ModelConfig) -> MoEConfig:
    """The sparse feed-forward part. Raises `ConfigError` when there are no experts in it that tokens choose."""
    if model.moe is None:
        way_out = "the run is dense in its feed-forward layers: it has no experts to look into; take a sparse run"
        raise ConfigError("model.moe", None, way_out)
    if model.moe.router.kind == "soft":
        raise ConfigError(
            "model.moe.router.kind", "soft", "mixes all tokens and chooses none; take a run whose tokens choose experts"
        )
    return model.moe


def chosen_experts(model: ModelConfig) -> MoEConfig | None:
    """The sparse part where tokens choose its experts, None where only the attention has such experts.

    Raises `ConfigError` when there are none at all.
    """
    if model.attention is not None and (model.moe is None or model.moe.router.kind == "soft"):
        return None
    return check_sparse(model)


def batch_rows(moe: MoEConfig | None, length: int) -> int:
    """Rows of a batch: `ROWS`, and more where routing groups ask for it."""
    together = 1 if moe is None else rows_together(moe, length)
    return together * -(-ROWS // together)


def observe(model: Decoder, batches: Sequence[Batch]) -> Observed:
    """Routes these batches as in evaluation. Raises `ConfigError` when the model has no experts that tokens choose."""
    moe = check_sparse(model.config)
    experts, gates, decisions, counts = [], [], [], []
    for batch in batches:
        on_device = jax.tree.map(jnp.asarray, batch)
        decision = record(model, on_device)
        counts.append(jax.device_get(_by_position(model, on_device)))
        real_BL = np.asarray(batch.segments_BL)[:, :-1] > 0
        decisions.append(decision)
        experts.append(by_row(np.asarray(decision.expert_GSK), moe, real_BL.shape)[:, real_BL])
        gates.append(by_row(np.asarray(decision.gate_GSK), moe, real_BL.shape)[:, real_BL])
    routed, dropped = (np.sum([count[i] for count in counts], axis=0, dtype=np.int64) for i in (0, 1))
    expert_NMK, gate_NMK = np.concatenate(experts, axis=1), np.concatenate(gates, axis=1)
    return Observed(
        tokens_of(batches),
        expert_NMK,
        gate_NMK,
        moe.num_choices,
        tuple(decisions),
        np.asarray(routed),
        np.asarray(dropped),
    )


def observe_attention(model: Decoder, batches: Sequence[Batch]) -> Int[np.ndarray, "N M K"]:
    """The attention's experts of the same tokens, in every layer; numbered as statistics count them, -1 is none."""
    experts = []
    for batch in batches:
        expert_NBLK = np.asarray(record_attention(model, jax.tree.map(jnp.asarray, batch)).expert_GSK)
        experts.append(expert_NBLK[:, np.asarray(batch.segments_BL)[:, :-1] > 0])
    return np.concatenate(experts, axis=1)


@jax.jit
def _by_position(model: Decoder, batch: Batch) -> tuple[jax.Array, jax.Array]:
    inputs = (batch.tokens_BL[:, :-1], batch.segments_BL[:, :-1], batch.positions_BL[:, :-1])
    reports = model(*inputs)[1]
    assert reports.feed_forward is not None
    dispatch = reports.feed_forward.dispatch
    return dispatch.routed_by_position, dispatch.dropped_by_position


def by_row(
    x_NGSK: Shaped[np.ndarray, "N G S K"], moe: MoEConfig, shape: tuple[int, ...]
) -> Shaped[np.ndarray, "N B L K"]:
    """Values of routing groups put back where their tokens stand; shape: rows and their length, [B, L]."""
    (layers, _, size, chosen), (rows, length) = x_NGSK.shape, shape
    if moe.grouping == "position":
        x_NGSK = x_NGSK.reshape(layers, rows // size, length, size, chosen).swapaxes(2, 3)
    return x_NGSK.reshape(layers, rows, length, chosen)


def tokens_of(batches: Sequence[Batch]) -> Tokens:
    """The tokens that a model reads of these batches, which are all but the last of a row."""
    columns, parts = [], 0
    for batch in batches:
        segments = np.asarray(batch.segments_BL)[:, :-1]
        starts = np.diff(segments, axis=1, prepend=0) != 0
        real = segments > 0
        part = np.cumsum(starts & real).reshape(segments.shape) - 1 + parts
        parts += int(np.sum(starts & real))
        found = (batch.tokens_BL, batch.domains_BL, batch.positions_BL)
        columns.append([*(np.asarray(column)[:, :-1][real] for column in found), part[real]])
    return Tokens(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def drop_shares(routed_NP: Int[np.ndarray, "N P"], dropped_NP: Int[np.ndarray, "N P"]) -> Float[np.ndarray, "N P"]:
    """Of the assignments at each place, the share that was dropped; 0 where there was none."""
    return dropped_NP / np.maximum(routed_NP, 1)


def loads(expert_NMK: Int[np.ndarray, "N M K"] | Int[Array, "N M K"], num_experts: int) -> Int[np.ndarray, "N E"]:
    """Assignments of every expert, before drops."""
    return np.stack([np.bincount(layer[layer >= 0], minlength=num_experts) for layer in np.asarray(expert_NMK)])
