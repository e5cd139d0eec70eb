"""The oracle of ReLU routing."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from oracle_choice import Choice, Group, RouterOracle, Smooth, log_sum_exp, softmax


def expert_weights(problem, logits_SE, mask_S) -> np.ndarray:
    """What the penalty multiplies the gates of each expert with, in one group."""
    num_experts = logits_SE.shape[1]
    if not problem.config.router.refine_balance:
        return np.ones(num_experts)
    positive_E = [sum(1 for t in np.flatnonzero(mask_S) if logits_SE[t, e] > 0) for e in range(num_experts)]
    return np.array(positive_E) * num_experts / (problem.config.top_k * max(int(mask_S.sum()), 1))


def decide(problem, group: Group) -> Choice:
    """See `RouterOracle`."""
    logits_SE = group.x_SD @ problem.weights["weight_DE"]
    width = problem.config.router.max_active or logits_SE.shape[1]
    candidate_SK = np.array(
        [sorted(range(len(logits_E)), key=lambda e, row=logits_E: -row[e])[:width] for logits_E in logits_SE]
    )
    gate_SK = np.array([[max(row[e], 0.0) for e in best] for row, best in zip(logits_SE, candidate_SK, strict=True)])
    weight_E = expert_weights(problem, logits_SE, group.mask_S)
    penalty = sum(
        weight_E[e] * max(logits_SE[t, e], 0.0) for t in np.flatnonzero(group.mask_S) for e in range(len(weight_E))
    )
    return Choice(
        candidate_SK=candidate_SK,
        gate_SK=gate_SK,
        used_SK=gate_SK > 0,
        probability_SE=np.array([softmax(list(logits_E)) for logits_E in logits_SE]),
        logsumexp_S=np.array([log_sum_exp(logits_E) for logits_E in logits_SE]),
        penalty=float(problem.state["coefficient"]) * penalty,
    )


def smooth(problem, weights, x_TD, candidate_TK) -> Smooth:
    """See `RouterOracle`."""
    size, mask_T = problem.group_size, problem.mask_BL.reshape(-1)
    fixed_TE = problem.x_BLD.reshape(x_TD.shape) @ problem.weights["weight_DE"]
    weight_TE = np.concatenate(
        [
            np.tile(expert_weights(problem, fixed_TE[i : i + size], mask_T[i : i + size]), (size, 1))
            for i in range(0, len(mask_T), size)
        ]
    )
    logits_TE = x_TD @ weights["weight_DE"]
    positive_TE = jnp.maximum(logits_TE, 0.0)
    powers_TE = jnp.exp(logits_TE)
    return Smooth(
        gate_TK=jnp.take_along_axis(positive_TE, jnp.asarray(candidate_TK), axis=1),
        probability_TE=powers_TE / powers_TE.sum(-1, keepdims=True),
        logsumexp_T=jnp.log(powers_TE.sum(-1)),
        penalty=problem.state["coefficient"] * jnp.sum(positive_TE * weight_TE * mask_T[:, None]),
    )


ORACLE = RouterOracle(decide, smooth)
