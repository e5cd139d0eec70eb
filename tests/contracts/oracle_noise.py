"""The oracle of the routers with Gaussian noise, without it (as in evaluation), and of their two losses."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from oracle_choice import Choice, Group, RouterOracle, Smooth, log_sum_exp, softmax


def squared_variation(totals) -> float:
    """Variance over squared mean, 0 for nothing at all."""
    mean = sum(totals) / len(totals)
    return sum((total - mean) ** 2 for total in totals) / len(totals) / mean**2 if mean else 0.0


def decide(problem, group: Group) -> Choice:
    """See `RouterOracle`. noisy_top_k: softmax over the chosen, whose gates are the importance; fixed_noise: before."""
    router, top_k, num_experts = problem.config.router, problem.config.top_k, problem.config.num_experts
    logits_SE = group.x_SD @ problem.weights["weight_DE"]
    probability_SE = np.array([softmax(list(logits_E)) for logits_E in logits_SE])
    best_SK = np.array([sorted(range(num_experts), key=lambda e: -logits_E[e])[:top_k] for logits_E in logits_SE])
    gate_SK = np.take_along_axis(probability_SE, best_SK, 1)
    if router.kind == "noisy_top_k":
        gate_SK = np.array([softmax(logits_E[best]) for logits_E, best in zip(logits_SE, best_SK, strict=True)])
    importance, load = np.zeros(num_experts), np.zeros(num_experts)
    for s in np.flatnonzero(group.mask_S):
        for k, expert in enumerate(best_SK[s]):
            load[expert] += 1
            importance[expert] += gate_SK[s, k] if router.kind == "noisy_top_k" else 0
        importance += probability_SE[s] if router.kind == "fixed_noise" else 0
    loss = router.importance * squared_variation(importance) + router.load * squared_variation(load)
    return Choice(
        candidate_SK=best_SK,
        gate_SK=gate_SK,
        used_SK=np.ones_like(best_SK, bool),
        probability_SE=probability_SE,
        logsumexp_S=np.array([log_sum_exp(logits_E) for logits_E in logits_SE]),
        penalty=loss * int(group.mask_S.sum()),
    )


def smooth(problem, weights, x_TD, candidate_TK) -> Smooth:
    """See `RouterOracle`. The load is a count here: a constant."""
    router, num_experts, size = problem.config.router, problem.config.num_experts, problem.group_size
    powers_TE = jnp.exp(x_TD @ weights["weight_DE"])
    probability_TE = powers_TE / powers_TE.sum(-1, keepdims=True)
    gate_TK = jnp.take_along_axis(probability_TE, jnp.asarray(candidate_TK), axis=1)
    count_TE = np.sum(candidate_TK[..., None] == np.arange(num_experts), axis=1)
    importance_TE = probability_TE
    if router.kind == "noisy_top_k":
        gate_TK = gate_TK / gate_TK.sum(-1, keepdims=True)
        importance_TE = probability_TE * count_TE / (probability_TE * count_TE).sum(-1, keepdims=True)
    penalty = 0.0
    for first in range(0, len(candidate_TK), size):
        real_S = problem.mask_BL.reshape(-1)[first : first + size]
        if not real_S.any():
            continue
        importance_E = importance_TE[first : first + size][real_S].sum(0)
        load_E = count_TE[first : first + size][real_S].sum(0)
        loss = router.importance * jnp.var(importance_E) / jnp.mean(importance_E) ** 2
        loss = loss + router.load * np.var(load_E) / np.mean(load_E) ** 2
        penalty = penalty + loss * real_S.sum()
    return Smooth(gate_TK, probability_TE, jnp.log(powers_TE.sum(-1)), penalty)


ORACLE = RouterOracle(decide, smooth)
