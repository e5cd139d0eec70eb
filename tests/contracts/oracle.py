"""A sparse layer in float64, one token at a time: what every router, dispatcher and mesh is compared with.

It shares no code with the package. `layer` is the literal program: a loop over tokens, over assignments in the order
of their priority, over kept assignments. `gradients` differentiates the same arithmetic with the decisions held fixed
(they are constant almost everywhere), and `test_contract_oracle` shows that both give the same loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers.top_k import TopK

LOAD_WEIGHT, Z_WEIGHT = 10.0, 3.0  # large, so that a wrong router loss shows beside the sum of squares

Weights = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A layer and its input. weights: by the last part of their names. training: which capacity counts."""

    config: MoEConfig
    activation: str
    training: bool
    weights: Weights
    x_BLD: np.ndarray
    mask_BL: np.ndarray

    @property
    def router(self) -> TopK:
        """The router's options; another kind of router needs a `choose` of its own."""
        assert isinstance(self.config.router, TopK)
        return self.config.router


@dataclasses.dataclass(frozen=True)
class Unit:
    """Sums over the real tokens of one statistics unit."""

    tokens: int
    padding: int
    declined: int
    load_E: np.ndarray
    importance_E: np.ndarray
    z: float
    entropy: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """candidate_TK: the k best experts. used_TK: chosen by policy, and no padding. kept_TK: found a slot."""

    y_BLD: np.ndarray
    loss: float
    load_balance: float
    z: float
    candidate_TK: np.ndarray
    used_TK: np.ndarray
    kept_TK: np.ndarray
    units: list[Unit]


def softmax(values):
    """exp(v) / sum exp(v)."""
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def slots_per_expert(factor: float | None, top_k: int, size: int, num_experts: int) -> int:
    """ceil(factor * k * S / E) in exact arithmetic, at most S."""
    if factor is None:
        return size
    return min(size, math.ceil(Fraction(str(factor)) * top_k * size / num_experts))


def hand_out_slots(expert_SK, gate_SK, num_slots: int, priority: str):
    """Which assignments of a group are kept; expert -1 asks for nothing."""
    size, top_k = np.shape(expert_SK)
    if priority == "token":
        queue = [(token, choice) for token in range(size) for choice in range(top_k)]
    else:
        queue = [(token, choice) for choice in range(top_k) for token in range(size)]
    if priority == "probability":
        queue.sort(key=lambda assignment: -gate_SK[assignment[0]][assignment[1]])
    taken: dict[int, int] = {}
    kept = np.zeros((size, top_k), bool)
    for token, choice in queue:
        expert = int(expert_SK[token][choice])
        if expert >= 0 and taken.get(expert, 0) < num_slots:
            taken[expert] = taken.get(expert, 0) + 1
            kept[token, choice] = True
    return kept


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


def hidden(kind: str, x, up, gate, xp):
    """The hidden values of a feed-forward layer; xp is numpy or jax.numpy."""

    def gelu(v):
        return 0.5 * v * (1 + xp.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    if kind == "relu":
        return xp.maximum(x @ up, 0)
    if kind == "gelu":
        return gelu(x @ up)
    if kind == "geglu":
        return gelu(x @ gate) * (x @ up)
    return (x @ gate) / (1 + xp.exp(-(x @ gate))) * (x @ up)


def expert(weights, kind: str, index: int, x, xp):
    """Expert `index` on one token or on rows of tokens."""
    gate = weights["gate_EDF"][index] if "gate_EDF" in weights else None
    return hidden(kind, x, weights["up_EDF"][index], gate, xp) @ weights["down_EFD"][index]


def shared_experts(weights, kind: str, x, xp):
    """The experts that see every token; 0 where there are none."""
    if "up_DF" not in weights:
        return 0.0
    return hidden(kind, x, weights["up_DF"], weights.get("gate_DF"), xp) @ weights["down_FD"]


def layer(problem: Problem) -> Answer:
    """The layer's output, decisions, counts and loss."""
    config, weights = problem.config, problem.weights
    batch, length, width = problem.x_BLD.shape
    x_TD, mask_T = problem.x_BLD.reshape(-1, width), problem.mask_BL.reshape(-1)
    tokens, num_experts, top_k = batch * length, config.num_experts, config.top_k
    logits_TE = x_TD @ weights["weight_DE"]
    candidate_TK, gate_TK = np.zeros((tokens, top_k), int), np.zeros((tokens, top_k))
    used_TK = np.zeros((tokens, top_k), bool)
    for t in range(tokens):
        candidate_TK[t], gate_TK[t], used_TK[t] = choose(logits_TE[t], problem.router, top_k)
        used_TK[t] &= mask_T[t]
        if problem.router.renormalise == "before_drop":
            gate_TK[t] /= sum(gate_TK[t])
    kept_TK = _kept(problem, candidate_TK, gate_TK, used_TK)
    y_TD = np.zeros((tokens, width))
    for t in range(tokens):
        total = sum(gate_TK[t, k] for k in range(top_k) if kept_TK[t, k])
        for k in range(top_k):
            if kept_TK[t, k]:
                weight = gate_TK[t, k] / total if problem.router.renormalise == "after_drop" else gate_TK[t, k]
                y_TD[t] += weight * expert(weights, problem.activation, candidate_TK[t, k], x_TD[t], np)
        y_TD[t] += shared_experts(weights, problem.activation, x_TD[t], np)
    units = [
        _unit(logits_TE[i : i + size], mask_T[i : i + size], candidate_TK[i : i + size], used_TK[i : i + size])
        for size in [unit_size(problem)]
        for i in range(0, tokens, size)
    ]
    real = max(sum(unit.tokens for unit in units), 1)
    shares = [share_E for _, share_E in shares_of(units, config.balance.scope)]
    balance = sum(
        num_experts * share_E[e] * unit.importance_E[e]
        for unit, share_E in zip(units, shares, strict=True)
        for e in range(num_experts)
    )
    balance, z = balance / real, sum(unit.z for unit in units) / real
    loss = float(np.sum(y_TD**2) + LOAD_WEIGHT * balance + Z_WEIGHT * z)
    return Answer(y_TD.reshape(problem.x_BLD.shape), loss, balance, z, candidate_TK, used_TK, kept_TK, units)


def unit_size(problem: Problem) -> int:
    """Tokens of a statistics unit."""
    length = problem.x_BLD.shape[1]
    return length if problem.config.balance.scope == "sequence" else problem.config.group_size or length


def shares_of(units: list[Unit], scope: str):
    """(unit, each expert's share of the assignments that its loss multiplies with)."""
    everything_E = sum((unit.load_E for unit in units), np.zeros(len(units[0].load_E)))
    for unit in units:
        load_E = everything_E if scope == "global" else unit.load_E
        yield unit, load_E / max(load_E.sum(), 1)


def _kept(problem: Problem, candidate_TK, gate_TK, used_TK):
    config = problem.config
    size = config.group_size or problem.x_BLD.shape[1]
    factor = config.capacity_factor if problem.training else config.capacity_factor_eval
    num_slots = slots_per_expert(factor, config.top_k, size, config.num_experts)
    asked_TK = np.where(used_TK, candidate_TK, -1)
    groups = [
        hand_out_slots(asked_TK[i : i + size], gate_TK[i : i + size], num_slots, config.priority)
        for i in range(0, len(asked_TK), size)
    ]
    return np.concatenate(groups)


def _unit(logits_SE, mask_S, candidate_SK, used_SK) -> Unit:
    load_E, importance_E = np.zeros(logits_SE.shape[1]), np.zeros(logits_SE.shape[1])
    declined, z, entropy = 0, 0.0, 0.0
    for t in np.flatnonzero(mask_S):
        probability_E = np.array(softmax(list(logits_SE[t])))
        importance_E += probability_E
        entropy -= float(np.sum(probability_E * np.log(probability_E)))
        z += math.log(sum(math.exp(value) for value in logits_SE[t])) ** 2
        for expert_, used in zip(candidate_SK[t], used_SK[t], strict=True):
            load_E[expert_] += used
            declined += int(not used)
    return Unit(int(mask_S.sum()), int((~mask_S).sum()), declined, load_E, importance_E, z, entropy)


def gradients(problem: Problem, answer: Answer) -> tuple[float, Weights, np.ndarray]:
    """(loss, gradients of the weights, gradient of the input), with the decisions of `answer` held fixed."""
    shares_TE = np.repeat(
        [share_E for _, share_E in shares_of(answer.units, problem.config.balance.scope)], unit_size(problem), axis=0
    )
    with jax.enable_x64(True):
        weights = {name: jnp.asarray(value) for name, value in problem.weights.items()}
        function = jax.value_and_grad(lambda w, x: _loss(w, x, problem, answer, jnp.asarray(shares_TE)), (0, 1))
        loss, (d_weights, d_x) = function(weights, jnp.asarray(problem.x_BLD))
        return float(loss), {name: np.asarray(value) for name, value in d_weights.items()}, np.asarray(d_x)


def _loss(weights, x_BLD, problem: Problem, answer: Answer, shares_TE):
    config, kind = problem.config, problem.activation
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    real_T = jnp.asarray(problem.mask_BL.reshape(-1), x_TD.dtype)
    logits_TE = x_TD @ weights["weight_DE"]
    powers_TE = jnp.exp(logits_TE)
    probability_TE = powers_TE / powers_TE.sum(-1, keepdims=True)
    gate_TK = jnp.take_along_axis(probability_TE, jnp.asarray(answer.candidate_TK), axis=1)
    if problem.router.gate == "softmax_after" or problem.router.renormalise == "before_drop":
        gate_TK = gate_TK / gate_TK.sum(-1, keepdims=True)
    gate_TK = jnp.where(jnp.asarray(answer.kept_TK), gate_TK, 0.0)
    if problem.router.renormalise == "after_drop":
        total_T1 = gate_TK.sum(-1, keepdims=True)
        gate_TK = gate_TK / jnp.where(total_T1 > 0, total_T1, 1.0)
    y_TD = jnp.zeros_like(x_TD) + shared_experts(weights, kind, x_TD, jnp)
    for index in range(config.num_experts):
        weight_T = jnp.sum(jnp.where(jnp.asarray(answer.candidate_TK == index), gate_TK, 0.0), axis=-1)
        y_TD = y_TD + weight_T[:, None] * expert(weights, kind, index, x_TD, jnp)
    real = jnp.maximum(real_T.sum(), 1)
    balance = config.num_experts * jnp.sum(shares_TE * probability_TE * real_T[:, None]) / real
    z = jnp.sum(jnp.log(powers_TE.sum(-1)) ** 2 * real_T) / real
    return jnp.sum(y_TD**2) + LOAD_WEIGHT * balance + Z_WEIGHT * z
