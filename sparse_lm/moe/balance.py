"""Router losses and balance metrics as functions of summed statistics.

Conventions: the load-balance loss uses the share f of the routed assignments (sum 1), counted before drops, and is 1 at
perfect balance for every k; padding counts nowhere; every loss is per layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_lm.moe.types import RouterStats


def load_balance(
    stats: RouterStats,
    tokens: jax.Array,
    whole_load_NE: Int[Array, "N E"] | None = None,
    expert_weights: Sequence[float] | None = None,
) -> Float[Array, "N"]:
    """E * sum_e f_e P_e per layer, averaged over the units with their real tokens as weights.

    tokens: real tokens of the whole batch, so that microbatches add up to the loss of the batch.
    whole_load_NE: assignments per expert in the whole batch, for the global scope: f is then that of the batch, also
        in a microbatch, and since no gradient flows through f the sum over microbatches is exact.
    expert_weights: w in sum_e (1 / w_e) * sum_e w_e f_e P_e, which is 1 where f_e = P_e is in proportion to 1 / w_e
        (MoE++'s heterogeneous loss, Jin et al. 2024, section 3.3, divided by its value there). None is 1 for all.
    Source: Fedus et al. 2021, equations 4 to 6, with f divided by k.
    """
    num_experts: float = stats.load_UE.shape[-1]
    if whole_load_NE is not None:
        share = _share(whole_load_NE)[:, None, :]
    else:
        share = _share(stats.load_UE)
    if expert_weights is not None:
        num_experts = sum(1 / weight for weight in expert_weights)
        share = share * jnp.asarray(expert_weights, jnp.float32)
    return num_experts * jnp.sum(share * stats.importance_UE, axis=(-2, -1)) / jnp.maximum(tokens, 1)


def z_loss(stats: RouterStats, tokens: jax.Array) -> Float[Array, "N"]:
    """Mean squared logsumexp of the router's logits per layer (Zoph et al. 2022, equation 5)."""
    return jnp.sum(stats.z_U, axis=-1) / jnp.maximum(tokens, 1)


def entropy(stats: RouterStats, tokens: jax.Array) -> Float[Array, "N"]:
    """Mean entropy of a token's probabilities per layer, in nats: 0 when every token is sure, log E when none is."""
    return jnp.sum(stats.entropy_U, axis=-1) / jnp.maximum(tokens, 1)


def router_losses(
    stats: RouterStats,
    tokens: jax.Array,
    whole_load_NE: Int[Array, "N E"] | None = None,
    expert_weights: Sequence[float] | None = None,
) -> dict[str, Float[Array, "N"]]:
    """Every loss that can be made of the statistics, by the name of its weight, per layer and unweighted."""
    return {
        "load": load_balance(stats, tokens, whole_load_NE, expert_weights),
        "z": z_loss(stats, tokens),
        "entropy": entropy(stats, tokens),
    }


def weighted(losses: Mapping[str, Float[Array, "N"]], weights: Mapping[str, float]) -> Float[Array, ""]:
    """The sum of the losses over layers with their weights.

    Raises `ValueError` when a loss has a weight and is not there: no declared loss is left out of the total silently.
    """
    missing = sorted(name for name, weight in weights.items() if weight and name not in losses)
    if missing:
        raise ValueError(
            f"the losses {missing} have weights and are not computed; moe.balance.router_losses makes {sorted(losses)}"
        )
    used = (weight * jnp.sum(losses[name]) for name, weight in weights.items() if weight)
    return sum(used, jnp.zeros((), jnp.float32))


def max_violation(load_NE: Int[Array, "*N E"]) -> Float[Array, "*N"]:
    """(largest load - mean load) / mean load; 0 at perfect balance (Wang et al. 2024, MaxVio)."""
    load = load_NE.astype(jnp.float32)
    mean = jnp.maximum(jnp.mean(load, axis=-1), 1e-9)
    return jnp.max(load, axis=-1) / mean - 1


def _share(load_E: jax.Array) -> jax.Array:
    load_E = load_E.astype(jnp.float32)
    return load_E / jnp.maximum(jnp.sum(load_E, axis=-1, keepdims=True), 1)
