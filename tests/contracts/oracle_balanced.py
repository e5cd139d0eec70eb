"""The oracles of routers that look at a whole group: expert choice, S-BASE and BASE layers."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from oracle_choice import Choice, Group, RouterOracle, Smooth, log_sum_exp, softmax


def _choice(logits_SE, candidate_SK, gate_SK, used_SK=None) -> Choice:
    used_SK = np.ones(np.shape(candidate_SK), bool) if used_SK is None else used_SK
    return Choice(
        candidate_SK=np.array(candidate_SK),
        gate_SK=np.array(gate_SK),
        used_SK=used_SK,
        probability_SE=np.array([softmax(list(logits_E)) for logits_E in logits_SE]),
        logsumexp_S=np.array([log_sum_exp(logits_E) for logits_E in logits_SE]),
    )


def _smooth(weights, x_TD, candidate_TK, gate) -> Smooth:
    """gate: (logits, probability) -> a number for each token and expert."""
    logits_TE = x_TD @ weights["weight_DE"]
    powers_TE = jnp.exp(logits_TE)
    probability_TE = powers_TE / powers_TE.sum(-1, keepdims=True)
    gate_TK = jnp.take_along_axis(gate(logits_TE, probability_TE), jnp.asarray(candidate_TK), axis=1)
    return Smooth(gate_TK, probability_TE, jnp.log(powers_TE.sum(-1)))


def decide_expert_choice(problem, group: Group) -> Choice:
    """Each expert in turn takes its best real tokens; with a limit, tokens then give up their worst experts."""
    router, real = problem.config.router, np.flatnonzero(group.mask_S)
    logits_SE = group.x_SD @ problem.weights["weight_DE"]
    probability_SE = np.array([softmax(list(logits_E)) for logits_E in logits_SE])
    size, num_experts = logits_SE.shape
    wish_SE, limit = np.array(probability_SE), router.max_experts
    if limit is not None and len(real):
        slots = min(group.slots, len(real) * limit / num_experts)
        wish_SE[real] = limited_assignment(probability_SE[real], slots, limit, router.entropy, router.iterations)
    used_SE = np.zeros((size, num_experts), bool)
    for expert in range(num_experts):
        ranking = sorted(real, key=lambda token, e=expert: -wish_SE[token, e])
        used_SE[ranking[: group.slots], expert] = True
    for token in real:
        ranking = sorted(np.flatnonzero(used_SE[token]), key=lambda expert, t=token: -probability_SE[t, expert])
        used_SE[token, ranking[limit or num_experts :]] = False
    candidate_SE = np.tile(np.arange(num_experts), (size, 1))
    return _choice(logits_SE, candidate_SE, probability_SE, used_SE)


def limited_assignment(score_SE, slots: float, limit: int, entropy: float, iterations: int):
    """Dykstra's algorithm by the book: before each projection its last correction is undone, and noted anew after.

    The last projection, onto entries of at most 1, is left out at the end: it would tie what it cuts off.
    """
    a_SE, notes = np.exp(np.asarray(score_SE, np.float64) / entropy), [1.0, 1.0, 1.0]
    projections = [
        lambda x: x * (slots / x.sum(0)),
        lambda x: x * np.minimum(1, limit / x.sum(1))[:, None],
        lambda x: np.minimum(x, 1),
    ]
    before_SE = a_SE
    for _ in range(iterations):
        for i, project in enumerate(projections):
            before_SE = a_SE * notes[i]
            a_SE = project(before_SE)
            notes[i] = before_SE / a_SE
    return before_SE


def transport_plan(cost_SE, iterations: int):
    """Rows and columns of exp(cost) scaled in turn: columns to an equal share of the rows, then rows to 1."""
    plan_SE = np.exp(np.asarray(cost_SE, np.float64))
    plan_SE = plan_SE / plan_SE.sum(1, keepdims=True)
    for _ in range(iterations):
        plan_SE = plan_SE / plan_SE.sum(0, keepdims=True) * len(plan_SE) / plan_SE.shape[1]
        plan_SE = plan_SE / plan_SE.sum(1, keepdims=True)
    return plan_SE


def decide_sinkhorn(problem, group: Group) -> Choice:
    """The best of the plan over the group's real tokens in training, of the logits in evaluation."""
    router = problem.config.router
    logits_SE = group.x_SD @ problem.weights["weight_DE"]
    preference_SE = np.array(logits_SE)
    if problem.training and group.mask_S.any():
        cost_SE = logits_SE[group.mask_S] / router.temperature
        preference_SE[group.mask_S] = transport_plan(cost_SE, router.iterations)
    candidate_SK = np.argsort(-preference_SE, axis=1, kind="stable")[:, : problem.config.top_k]
    probability_SE = np.array([softmax(list(logits_E)) for logits_E in logits_SE])
    return _choice(logits_SE, candidate_SK, np.take_along_axis(probability_SE, candidate_SK, axis=1))


def best_assignment(affinity_SE, room: int) -> list[int]:
    """The expert of each token in the assignment with the largest sum, at most `room` tokens per expert.

    Dynamic programming over the numbers of tokens that each expert has so far: all that a later token needs to know.
    """
    num_experts = np.shape(affinity_SE)[1]
    best: dict[tuple[int, ...], tuple[float, list[int]]] = {(0,) * num_experts: (0.0, [])}
    for affinity_E in affinity_SE:
        longer: dict[tuple[int, ...], tuple[float, list[int]]] = {}
        for loads, (total, experts) in best.items():
            for expert in range(num_experts):
                if loads[expert] < room:
                    after = (*loads[:expert], loads[expert] + 1, *loads[expert + 1 :])
                    value = total + float(affinity_E[expert])
                    if after not in longer or longer[after][0] < value:
                        longer[after] = (value, [*experts, expert])
        best = longer
    return max(best.values(), key=lambda entry: entry[0])[1]


def decide_base(problem, group: Group) -> Choice:
    """The best balanced assignment in training, the best expert in evaluation."""
    affinity_SE = group.x_SD @ problem.weights["weight_DE"]
    expert_S = np.argmax(affinity_SE, axis=1)
    if problem.training:
        room = math.ceil(len(affinity_SE) / affinity_SE.shape[1])
        expert_S[group.mask_S] = best_assignment(affinity_SE[group.mask_S], room)
    gates = [1 / (1 + math.exp(-affinity_E[expert])) for affinity_E, expert in zip(affinity_SE, expert_S, strict=True)]
    return _choice(affinity_SE, expert_S[:, None], np.array(gates)[:, None])


def by_probability(problem, weights, x_TD, candidate_TK) -> Smooth:
    """Gates are softmax probabilities."""
    return _smooth(weights, x_TD, candidate_TK, lambda logits_TE, probability_TE: probability_TE)


def by_sigmoid(problem, weights, x_TD, candidate_TK) -> Smooth:
    """Gates are sigmoids of the affinities."""
    return _smooth(weights, x_TD, candidate_TK, lambda logits_TE, probability_TE: 1 / (1 + jnp.exp(-logits_TE)))


EXPERT_CHOICE = RouterOracle(decide_expert_choice, by_probability)
SINKHORN = RouterOracle(decide_sinkhorn, by_probability)
BASE = RouterOracle(decide_base, by_sigmoid)
