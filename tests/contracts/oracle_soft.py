"""The oracle of Soft MoE: slots are filled and read one at a time."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from oracle_choice import Choice, Group, RouterOracle, Smooth, log_sum_exp, softmax


def unit(vector):
    """The vector at length 1."""
    return vector / math.sqrt(sum(value**2 for value in vector))


def decide(problem, group: Group) -> Choice:
    """See `RouterOracle`: every token is with every expert, and its weights are summed over slots."""
    phi_DEC, scale = problem.weights["phi_DEC"], problem.weights["scale"]
    experts, slots = phi_DEC.shape[1:]
    size = len(group.x_SD)
    gate_SK, logsumexp_S = np.zeros((size, experts)), np.zeros(size)
    for token in range(size):
        logits = [
            scale * unit(group.x_SD[token]) @ unit(phi_DEC[:, e, c]) for e in range(experts) for c in range(slots)
        ]
        gate_SK[token] = np.reshape(softmax(logits), (experts, slots)).sum(1)
        logsumexp_S[token] = log_sum_exp(logits)
    return Choice(
        candidate_SK=np.tile(np.arange(experts), (size, 1)),
        gate_SK=gate_SK,
        used_SK=np.ones((size, experts), bool),
        probability_SE=gate_SK,
        logsumexp_S=logsumexp_S,
    )


def _logits(weights, x_TD):
    x_TD = x_TD / jnp.sqrt(jnp.sum(x_TD**2, -1, keepdims=True))
    phi_DEC = weights["phi_DEC"] / jnp.sqrt(jnp.sum(weights["phi_DEC"] ** 2, 0, keepdims=True))
    return weights["scale"] * jnp.tensordot(x_TD, phi_DEC, 1)


def smooth(problem, weights, x_TD, candidate_TK) -> Smooth:
    """See `RouterOracle`."""
    powers_TEC = jnp.exp(_logits(weights, x_TD))
    total_T = powers_TEC.sum((1, 2))
    share_TE = powers_TEC.sum(2) / total_T[:, None]
    return Smooth(share_TE, share_TE, jnp.log(total_T))


def output(problem, weights, x_SD, mask_S, expert):
    """The group's output. expert: (index, rows) -> rows."""
    powers_SEC = jnp.exp(_logits(weights, x_SD)) * mask_S[:, None, None]
    total_S = jnp.maximum(powers_SEC.sum((1, 2)), 1e-30)

    def of_slot(powers_S, e):
        dispatch_S = powers_S / jnp.maximum(powers_S.sum(), 1e-30)
        return (powers_S / total_S)[:, None] * expert(e, (dispatch_S @ x_SD)[None])

    of_slots = jax.vmap(jax.vmap(of_slot, (1, None)), (1, 0))
    return jnp.sum(of_slots(powers_SEC, jnp.arange(powers_SEC.shape[1])), axis=(0, 1))


ORACLE = RouterOracle(decide, smooth, output)
