"""The oracle of expert prototyping."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from oracle_choice import Choice, Group, RouterOracle, Smooth, log_sum_exp, softmax


def decide(problem, group: Group) -> Choice:
    """See `RouterOracle`."""
    top_k, members = problem.config.top_k, problem.config.num_experts // problem.config.top_k
    logits_SE = group.x_SD @ problem.weights["weight_DE"]
    best, gates, probabilities = [], [], []
    for logits_E in logits_SE:
        parts = [softmax(logits_E[i * members : (i + 1) * members]) for i in range(top_k)]
        best.append([i * members + part.index(max(part)) for i, part in enumerate(parts)])
        gates.append([max(part) for part in parts])
        probabilities.append([p / top_k for part in parts for p in part])
    return Choice(
        candidate_SK=np.array(best),
        gate_SK=np.array(gates),
        used_SK=np.ones((len(best), top_k), bool),
        probability_SE=np.array(probabilities),
        logsumexp_S=np.array([log_sum_exp(logits_E) for logits_E in logits_SE]),
    )


def smooth(problem, weights, x_TD, candidate_TK) -> Smooth:
    """See `RouterOracle`."""
    top_k = problem.config.top_k
    powers_TE = jnp.exp(x_TD @ weights["weight_DE"])
    parts = [part / part.sum(-1, keepdims=True) for part in jnp.split(powers_TE, top_k, axis=-1)]
    share_TE = jnp.concatenate(parts, axis=-1)
    gate_TK = jnp.take_along_axis(share_TE, jnp.asarray(candidate_TK), axis=1)
    return Smooth(gate_TK, share_TE / top_k, jnp.log(powers_TE.sum(-1)))


ORACLE = RouterOracle(decide, smooth)
