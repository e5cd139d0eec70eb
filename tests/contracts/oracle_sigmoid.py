"""The oracle of sigmoid routing with a bias and limited groups."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from oracle_choice import Choice, Group, RouterOracle, Smooth, log_sum_exp, softmax

from sparse_lm.moe.routers.sigmoid import Sigmoid


def allowed(biased_E, router: Sigmoid) -> list[int]:
    """The experts of the groups that a token may use."""
    size = len(biased_E) // router.num_groups
    members = [list(range(group * size, (group + 1) * size)) for group in range(router.num_groups)]
    count = 2 if router.group_score == "top2_sum" else 1
    worth = [sum(sorted((biased_E[e] for e in group), reverse=True)[:count]) for group in members]
    best = sorted(range(router.num_groups), key=lambda group: -worth[group])[: router.groups_kept]
    return [expert for group in best for expert in members[group]]


def choose(score_E, bias_E, router: Sigmoid, top_k: int):
    """(experts, gates) of one token."""
    biased_E = [score + bias for score, bias in zip(score_E, bias_E, strict=True)]
    best = sorted(allowed(biased_E, router), key=lambda expert: -biased_E[expert])[:top_k]
    gates = [score_E[expert] for expert in best]
    total = sum(gates) if router.renormalise == "before_drop" else 1.0
    return best, [router.scale * gate / total for gate in gates]


def decide(problem, group: Group) -> Choice:
    """See `RouterOracle`."""
    router, bias_E = problem.config.router, problem.state["bias_E"]
    logits_SE = group.x_SD @ problem.weights["weight_DE"]
    if router.pathway:
        logits_SE = logits_SE + group.carried_SE @ problem.weights["pathway_KE"]
    if router.score == "sigmoid":
        score_SE = [[1 / (1 + math.exp(-value)) for value in logits_E] for logits_E in logits_SE]
    else:
        score_SE = [softmax(list(logits_E)) for logits_E in logits_SE]
    chosen = [choose(score_E, bias_E, router, problem.config.top_k) for score_E in score_SE]
    candidate_SK = np.array([best for best, _ in chosen])
    return Choice(
        candidate_SK=candidate_SK,
        gate_SK=np.array([gates for _, gates in chosen]),
        used_SK=np.ones(candidate_SK.shape, bool),
        probability_SE=np.array([[score / sum(score_E) for score in score_E] for score_E in score_SE]),
        logsumexp_S=np.array([log_sum_exp(logits_E) for logits_E in logits_SE]),
    )


def smooth(problem, weights, x_TD, candidate_TK) -> Smooth:
    """See `RouterOracle`."""
    router = problem.config.router
    logits_TE = x_TD @ weights["weight_DE"]
    if router.pathway:
        logits_TE = logits_TE + problem.carried_BLE.reshape(logits_TE.shape) @ weights["pathway_KE"]
    powers_TE = jnp.exp(logits_TE)
    if router.score == "sigmoid":
        score_TE = powers_TE / (1 + powers_TE)
    else:
        score_TE = powers_TE / powers_TE.sum(-1, keepdims=True)
    gate_TK = jnp.take_along_axis(score_TE, jnp.asarray(candidate_TK), axis=1)
    if router.renormalise == "before_drop":
        gate_TK = gate_TK / gate_TK.sum(-1, keepdims=True)
    probability_TE = score_TE / score_TE.sum(-1, keepdims=True)
    return Smooth(router.scale * gate_TK, probability_TE, jnp.log(powers_TE.sum(-1)))


ORACLE = RouterOracle(decide, smooth)
