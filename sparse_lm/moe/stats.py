"""From a decision to the sums that losses and telemetry are made of, in one place for all routers and dispatchers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from sparse_lm.moe.types import (
    HISTOGRAM_BINS,
    POSITION_BINS,
    DispatchStats,
    LayerStats,
    RouterStats,
    Scores,
    TokenChoice,
)
from sparse_lm.sharding import Rules


def router_stats(
    decision: TokenChoice, scores: Scores, mask_GS: Bool[Array, "G S"], unit: int, rules: Rules
) -> RouterStats:
    """Sums per statistics unit of `unit` tokens (a sequence or a group). mask_GS: False is padding."""
    num_experts = scores.probability_GSE.shape[-1]
    real_GS = mask_GS.astype(jnp.float32)
    probability_GSE = scores.probability_GSE * real_GS[..., None]
    chosen_GSK = decision.expert_GSK >= 0
    load_GSE = jnp.sum(jax.nn.one_hot(decision.expert_GSK, num_experts, dtype=jnp.int32), axis=2)
    # p log p with the limit 0 at p = 0, whose gradient is 0 too.
    safe = jnp.where(probability_GSE > 0, probability_GSE, 1.0)

    def per_unit(x):
        groups, size = x.shape[:2]
        shape = (groups * size // unit, unit, *x.shape[2:])
        return jnp.sum(rules.reshape(x, shape, "U." + "." * (x.ndim - 2)), axis=1)

    return RouterStats(
        tokens_U=per_unit(mask_GS.astype(jnp.int32)),
        padding_U=per_unit(1 - mask_GS.astype(jnp.int32)),
        declined_U=per_unit(jnp.sum(~chosen_GSK & mask_GS[..., None], axis=2, dtype=jnp.int32)),
        load_UE=per_unit(load_GSE),
        importance_UE=per_unit(probability_GSE),
        z_U=per_unit(jnp.square(scores.logsumexp_GS) * real_GS),
        entropy_U=per_unit(-jnp.sum(safe * jnp.log(safe), axis=-1)),
        penalty_U=per_unit(real_GS * (0.0 if scores.penalty_GS is None else scores.penalty_GS)),
    )


def dispatch_stats(
    decision: TokenChoice, kept_GSK: Bool[Array, "G S K"], mask_GS: Bool[Array, "G S"], num_experts: int
) -> DispatchStats:
    """Counts over all groups. kept_GSK: True where the assignment found a slot."""
    size, top_k = decision.expert_GSK.shape[1:]
    chosen_GSK = decision.expert_GSK >= 0
    dropped_GSK = chosen_GSK & ~kept_GSK
    gate_GSK = jax.lax.stop_gradient(decision.gate_GSK)
    bins_GSK = jnp.where(kept_GSK, jnp.clip(gate_GSK * HISTOGRAM_BINS, 0, HISTOGRAM_BINS - 1).astype(jnp.int32), -1)
    served_GS = jnp.where(mask_GS, jnp.sum(kept_GSK, axis=2, dtype=jnp.int32), -1)
    place_SP = jax.nn.one_hot(jnp.arange(size) * POSITION_BINS // size, POSITION_BINS, dtype=jnp.int32)

    def count(x):
        return jnp.sum(x, dtype=jnp.int32)

    def histogram(x, bins):
        return jnp.sum(x[..., None] == jnp.arange(bins), axis=tuple(range(x.ndim)), dtype=jnp.int32)

    expert_GSK = jnp.where(dropped_GSK, decision.expert_GSK, -1)

    def by_position(x):
        return jnp.sum(x, axis=(0, 2), dtype=jnp.int32) @ place_SP

    return DispatchStats(
        kept=count(kept_GSK),
        dropped=count(dropped_GSK),
        served=histogram(served_GS, top_k + 1),
        gate_histogram=histogram(bins_GSK, HISTOGRAM_BINS),
        routed_by_position=by_position(chosen_GSK),
        dropped_by_position=by_position(dropped_GSK),
        dropped_E=histogram(expert_GSK, num_experts),
        gate_mass=jnp.sum(gate_GSK),
        kept_gate_mass=jnp.sum(jnp.where(kept_GSK, gate_GSK, 0.0)),
    )


def unaccounted(stats: LayerStats, top_k: int) -> jax.Array:
    """kept + dropped + declined + padding - tokens * k, per layer: 0, or the layer has lost count."""
    router, dispatch = stats.router, stats.dispatch
    tokens = jnp.sum(router.tokens_U + router.padding_U, axis=-1)
    padding = jnp.sum(router.padding_U, axis=-1)
    declined = jnp.sum(router.declined_U, axis=-1)
    return dispatch.kept + dispatch.dropped + declined + top_k * padding - top_k * tokens
