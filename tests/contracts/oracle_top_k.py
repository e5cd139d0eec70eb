"""The oracle of top-k routing."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from oracle_choice import Choice, Group, RouterOracle, Smooth, log_sum_exp, softmax

from sparse_lm.moe.routers.top_k import TopK


def choose(logits_E, router: TopK, top_k: int):
    """(experts, gates before any renormalisation, used) of one real token, without noise."""
    best = sorted(range(len(logits_E)), key=lambda expert: -logits_E[expert])[:top_k]
    if router.gate == "softmax_after":
        gates = softmax([logits_E[expert] for expert in best])
    else:
        gates = [softmax(list(logits_E))[expert] for expert in best]
    used = []
    for choice in range(top_k):
        share = gates[choice] / sum(gates[:2])
        by_policy = {
            "all": True,
            "none": False,
            "threshold": share > router.second_threshold,
            "gshard": True,  # in evaluation
            "mesh_tf": True,  # in evaluation
        }[router.second_expert]
        used.append(choice == 0 or by_policy)
    return best, gates, used


def decide(problem, group: Group) -> Choice:
    """See `RouterOracle`."""
    router, top_k = problem.config.router, problem.config.top_k
    logits_SE = group.x_SD @ problem.weights["weight_DE"] + problem.weights.get("logit_bias_E", 0.0)
    if router.pathway:
        logits_SE = logits_SE + group.carried_SE @ problem.weights["pathway_KE"]
    chosen = [choose(logits_E, router, top_k) for logits_E in logits_SE]
    gate_SK = np.array([gates for _, gates, _ in chosen])
    if router.renormalise == "before_drop":
        gate_SK = np.array([gates / sum(gates) for gates in gate_SK])
    return Choice(
        candidate_SK=np.array([best for best, _, _ in chosen]),
        gate_SK=gate_SK,
        used_SK=np.array([used for _, _, used in chosen]),
        probability_SE=np.array([softmax(list(logits_E)) for logits_E in logits_SE]),
        logsumexp_S=np.array([log_sum_exp(logits_E) for logits_E in logits_SE]),
    )


def smooth(problem, weights, x_TD, candidate_TK) -> Smooth:
    """See `RouterOracle`."""
    router = problem.config.router
    logits_TE = x_TD @ weights["weight_DE"] + weights.get("logit_bias_E", 0.0)
    if router.pathway:
        logits_TE = logits_TE + problem.carried_BLE.reshape(logits_TE.shape) @ weights["pathway_KE"]
    powers_TE = jnp.exp(logits_TE)
    probability_TE = powers_TE / powers_TE.sum(-1, keepdims=True)
    gate_TK = jnp.take_along_axis(probability_TE, jnp.asarray(candidate_TK), axis=1)
    if router.gate == "softmax_after" or router.renormalise == "before_drop":
        gate_TK = gate_TK / gate_TK.sum(-1, keepdims=True)
    return Smooth(gate_TK, probability_TE, jnp.log(powers_TE.sum(-1)))


ORACLE = RouterOracle(decide, smooth)
