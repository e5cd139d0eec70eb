"""A sparse layer in float64, one token at a time: what every router, dispatcher and mesh is compared with.

It shares no code with the package. What kinds of router differ in stands in files of its own (`oracle_choice` says
what); the rest is the same for all. `layer` is the literal program: a loop over tokens, over assignments in the order
of their priority, over kept assignments. `gradients` differentiates the same arithmetic with the decisions held fixed
(they are constant almost everywhere), and `test_contract_oracle` shows that both give the same loss.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import oracle_balanced
import oracle_free
import oracle_hash
import oracle_noise
import oracle_prototype
import oracle_relu
import oracle_sigmoid
import oracle_soft
import oracle_sparse_mixer
import oracle_top_k
from oracle_choice import Choice, Group, RouterOracle

from sparse_lm.moe.config import MoEConfig

ROUTERS: dict[str, RouterOracle] = {
    "top_k": oracle_top_k.ORACLE,
    "noisy_top_k": oracle_noise.ORACLE,
    "fixed_noise": oracle_noise.ORACLE,
    "prototype": oracle_prototype.ORACLE,
    "sigmoid": oracle_sigmoid.ORACLE,
    "relu": oracle_relu.ORACLE,
    "hash": oracle_hash.ORACLE,
    "expert_choice": oracle_balanced.EXPERT_CHOICE,
    "sinkhorn": oracle_balanced.SINKHORN,
    "base": oracle_balanced.BASE,
    "sparse_mixer": oracle_sparse_mixer.ORACLE,
    "soft": oracle_soft.ORACLE,
}

LOAD_WEIGHT, Z_WEIGHT = 10.0, 3.0  # large, so that a wrong router loss shows beside the sum of squares

Weights = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A layer and its input. weights, state: by the last part of their names. training: which capacity counts."""

    config: MoEConfig
    activation: str
    training: bool
    weights: Weights
    x_BLD: np.ndarray
    mask_BL: np.ndarray
    ids_BL: np.ndarray
    previous_BL: np.ndarray
    carried_BLE: np.ndarray
    state: Weights = dataclasses.field(default_factory=dict)

    @property
    def router(self) -> RouterOracle:
        """The oracle of the kind of router that the layer has."""
        return ROUTERS[self.config.router.kind]

    @property
    def after_drop(self) -> bool:
        """Whether gates are renormalised over what was kept."""
        return getattr(self.config.router, "renormalise", "none") == "after_drop"

    @property
    def on_input(self) -> bool:
        """Whether gates multiply the experts' inputs."""
        return getattr(self.config.router, "gate_on", "output") == "input"

    @property
    def group_size(self) -> int:
        """Tokens that compete for the same slots."""
        return self.config.group_size or self.x_BLD.shape[1]

    @property
    def slots(self) -> int:
        """Slots per expert and group."""
        factor = self.config.capacity_factor if self.training else self.config.capacity_factor_eval
        return slots_per_expert(factor, self.config.top_k, self.group_size, oracle_free.divisor(self.config))


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
    """candidate_TK: experts considered. used_TK: chosen by policy, and no padding. kept_TK: found a slot."""

    y_BLD: np.ndarray
    loss: float
    load_balance: float
    z: float
    candidate_TK: np.ndarray
    used_TK: np.ndarray
    kept_TK: np.ndarray
    units: list[Unit]


def slots_per_expert(factor: float | None, top_k: int, size: int, num_experts: int | Fraction) -> int:
    """ceil(factor * k * S / E) in exact arithmetic, at most S."""
    if factor is None:
        return size
    return min(size, math.ceil(Fraction(str(factor)) * top_k * size / num_experts))


def hand_out_slots(expert_SK, gate_SK, num_slots: int, priority: str):
    """Which assignments of a group are kept; expert -1 asks for nothing."""
    size, top_k = np.shape(expert_SK)
    if priority in ("token", "random"):  # without a random order it is the one by token
        queue = [(token, choice) for token in range(size) for choice in range(top_k)]
    else:
        queue = [(token, choice) for choice in range(top_k) for token in range(size)]
    if priority == "probability":
        queue.sort(key=lambda assignment: -gate_SK[assignment[0]][assignment[1]])
    if priority == "batch":
        queue.sort(key=lambda assignment: (assignment[1], -max(gate_SK[assignment[0]])))
    taken: dict[int, int] = {}
    kept = np.zeros((size, top_k), bool)
    for token, choice in queue:
        expert = int(expert_SK[token][choice])
        if expert >= 0 and taken.get(expert, 0) < num_slots:
            taken[expert] = taken.get(expert, 0) + 1
            kept[token, choice] = True
    return kept


def activate(kind: str, up, gate, xp):
    """The hidden values of a feed-forward layer from its products; xp is numpy or jax.numpy."""

    def gelu(v):
        return 0.5 * v * (1 + xp.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    if kind == "relu":
        return xp.maximum(up, 0)
    if kind == "gelu":
        return gelu(up)
    if kind == "geglu":
        return gelu(gate) * up
    if kind == "clamped_swiglu":
        gate = xp.minimum(gate, 7.0)
        return gate / (1 + xp.exp(-1.702 * gate)) * (xp.clip(up, -7.0, 7.0) + 1)
    return gate / (1 + xp.exp(-gate)) * up


def expert(weights, kind: str, index: int, x, xp):
    """Expert `index` on one token or on rows of tokens."""

    def bias(name):
        return weights[name][index] if name in weights else 0.0

    up = x @ weights["up_EDF"][index] + bias("up_bias_EF")
    gate = x @ weights["gate_EDF"][index] + bias("gate_bias_EF") if "gate_EDF" in weights else None
    return activate(kind, up, gate, xp) @ weights["down_EFD"][index] + bias("down_bias_ED")


def routed(config: MoEConfig, weights, kind: str, index: int, x, xp):
    """The same, or a free expert, which come after the others."""
    if index < config.num_experts:
        return expert(weights, kind, index, x, xp)
    return oracle_free.expert(config, weights, index - config.num_experts, x, xp)


def with_shared(config: MoEConfig, weights, kind: str, x, routed, xp):
    """The routed experts' output and that of the experts that see every token, for one token or rows of them."""
    if "up_DF" not in weights:
        return routed
    gate = x @ weights["gate_DF"] if "gate_DF" in weights else None
    shared = activate(kind, x @ weights["up_DF"], gate, xp) @ weights["down_FD"]
    if config.shared_gate == "none":
        return routed + shared
    powers = xp.exp(x @ weights["mix_DK"])
    if config.shared_gate == "sigmoid":
        return routed + powers / (1 + powers) * shared
    first = powers[..., :1] / (powers[..., :1] + powers[..., 1:])
    return first * routed + (1 - first) * shared


def layer(problem: Problem) -> Answer:
    """The layer's output, decisions, counts and loss."""
    config, weights = problem.config, problem.weights
    batch, length, width = problem.x_BLD.shape
    x_TD, mask_T, ids_T = problem.x_BLD.reshape(-1, width), problem.mask_BL.reshape(-1), problem.ids_BL.reshape(-1)
    previous_T, carried_TE = problem.previous_BL.reshape(-1), problem.carried_BLE.reshape(len(x_TD), -1)
    tokens, size = batch * length, problem.group_size
    worth_E = oracle_free.worths(config)
    groups = [
        Group(*(of_T[i : i + size] for of_T in (x_TD, mask_T, ids_T, previous_T, carried_TE)), problem.slots)  # type: ignore[call-arg]
        for i in range(0, tokens, size)
    ]
    choices = [problem.router.decide(problem, group) for group in groups]
    candidate_TK = np.concatenate([choice.candidate_SK for choice in choices])
    gate_TK = np.concatenate([choice.gate_SK for choice in choices])
    used_TK = np.concatenate([choice.used_SK for choice in choices]) & mask_T[:, None]
    mixed = problem.router.output is not None
    kept_TK = used_TK if mixed else _kept(problem, candidate_TK, gate_TK, used_TK)
    y_TD = np.array(_mixed(problem, weights, problem.x_BLD, mask_T)) if mixed else np.zeros((tokens, width))
    for t in range(tokens):
        total = sum(gate_TK[t][kept_TK[t]])
        for k in () if mixed else np.flatnonzero(kept_TK[t]):
            weight = gate_TK[t, k] / total if problem.after_drop else gate_TK[t, k]
            inner, outer = (weight, 1.0) if problem.on_input else (1.0, weight)
            y_TD[t] += outer * routed(config, weights, problem.activation, candidate_TK[t, k], inner * x_TD[t], np)
        y_TD[t] = with_shared(config, weights, problem.activation, x_TD[t], y_TD[t], np)
    units = _units(problem, choices, candidate_TK, used_TK)
    real = max(sum(unit.tokens for unit in units), 1)
    shares = [share_E for _, share_E in shares_of(units, config.balance.scope)]
    balance = sum(
        sum(1 / worth for worth in worth_E) * worth_E[e] * share_E[e] * unit.importance_E[e]
        for unit, share_E in zip(units, shares, strict=True)
        for e in range(len(worth_E))
    )
    balance, z = balance / real, sum(unit.z for unit in units) / real
    penalty = sum(choice.penalty for choice in choices) / real
    loss = float(np.sum(y_TD**2) + LOAD_WEIGHT * balance + Z_WEIGHT * z + penalty)
    return Answer(y_TD.reshape(problem.x_BLD.shape), loss, balance, z, candidate_TK, used_TK, kept_TK, units)


def _mixed(problem: Problem, weights, x_BLD, mask_T):
    """The routed output of all groups where experts see mixtures of tokens."""
    output = problem.router.output
    assert output is not None
    x_GSD = x_BLD.reshape(-1, problem.group_size, x_BLD.shape[-1])
    mask_GS = mask_T.reshape(x_GSD.shape[:2])
    with jax.enable_x64(True):
        weights = {name: jnp.asarray(value) for name, value in weights.items()}

        @jax.jit
        def of_group(weights, x_SD, mask_S):
            def own(index, x):
                return expert(weights, problem.activation, index, x, jnp)

            return output(problem, weights, x_SD, mask_S, own)

        groups = [of_group(weights, *group) for group in zip(jnp.asarray(x_GSD), mask_GS, strict=True)]
        y_TD = jnp.concatenate(groups)
    return y_TD


def unit_size(problem: Problem) -> int:
    """Tokens of a statistics unit."""
    return problem.x_BLD.shape[1] if problem.config.balance.scope == "sequence" else problem.group_size


def shares_of(units: list[Unit], scope: str):
    """(unit, each expert's share of the assignments that its loss multiplies with)."""
    everything_E = sum((unit.load_E for unit in units), np.zeros(len(units[0].load_E)))
    for unit in units:
        load_E = everything_E if scope == "global" else unit.load_E
        yield unit, load_E / max(load_E.sum(), 1)


def _kept(problem: Problem, candidate_TK, gate_TK, used_TK):
    size = problem.group_size
    free_TK = candidate_TK >= problem.config.num_experts
    asked_TK = np.where(used_TK & ~free_TK, candidate_TK, -1)
    groups = [
        hand_out_slots(asked_TK[i : i + size], gate_TK[i : i + size], problem.slots, problem.config.priority)
        for i in range(0, len(asked_TK), size)
    ]
    return np.concatenate(groups) | (used_TK & free_TK)


def _units(problem: Problem, choices: list[Choice], candidate_TK, used_TK) -> list[Unit]:
    mask_T, size = problem.mask_BL.reshape(-1), unit_size(problem)
    probability_TE = np.concatenate([choice.probability_SE for choice in choices])
    logsumexp_T = np.concatenate([choice.logsumexp_S for choice in choices])
    units = []
    for first in range(0, len(mask_T), size):
        load_E, importance_E = np.zeros(probability_TE.shape[1]), np.zeros(probability_TE.shape[1])
        declined, z, entropy = 0, 0.0, 0.0
        real = [t for t in range(first, first + size) if mask_T[t]]
        for t in real:
            importance_E += probability_TE[t]
            entropy -= sum(p * math.log(p) for p in probability_TE[t] if p > 0)
            z += logsumexp_T[t] ** 2
            for expert_, used in zip(candidate_TK[t], used_TK[t], strict=True):
                load_E[expert_] += used
                declined += int(not used)
        units.append(Unit(len(real), size - len(real), declined, load_E, importance_E, z, entropy))
    return units


def gradients(problem: Problem, answer: Answer) -> tuple[float, Weights, np.ndarray]:
    """(loss, gradients of the weights, gradient of the input), with the decisions of `answer` held fixed."""
    shares_TE = np.repeat(
        [share_E for _, share_E in shares_of(answer.units, problem.config.balance.scope)], unit_size(problem), axis=0
    )
    with jax.enable_x64(True):
        weights = {name: jnp.asarray(value) for name, value in problem.weights.items()}
        function = jax.jit(jax.value_and_grad(lambda w, x: _loss(w, x, problem, answer, shares_TE), (0, 1)))
        loss, (d_weights, d_x) = function(weights, jnp.asarray(problem.x_BLD))
        return float(loss), {name: np.asarray(value) for name, value in d_weights.items()}, np.asarray(d_x)


def _loss(weights, x_BLD, problem: Problem, answer: Answer, shares_TE):
    config, kind = problem.config, problem.activation
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    real_T = jnp.asarray(problem.mask_BL.reshape(-1), x_TD.dtype)
    smooth = problem.router.smooth(problem, weights, x_TD, answer.candidate_TK)
    gate_TK = jnp.where(jnp.asarray(answer.kept_TK), smooth.gate_TK, 0.0)
    if problem.after_drop:
        total_T1 = gate_TK.sum(-1, keepdims=True)
        gate_TK = gate_TK / jnp.where(total_T1 > 0, total_T1, 1.0)
    y_TD, worth_E = jnp.zeros_like(x_TD), np.array(oracle_free.worths(config))
    if problem.router.output is not None:
        y_TD = _mixed(problem, weights, x_BLD, problem.mask_BL.reshape(-1))

    def of_expert(index, own):
        chosen_TK = jnp.asarray(answer.candidate_TK) == index
        weight_T = jnp.sum(jnp.where(chosen_TK, gate_TK, 0.0), axis=-1)
        chosen_T = jnp.any(chosen_TK & jnp.asarray(answer.kept_TK), axis=-1)
        inner_T, outer_T = (weight_T, chosen_T) if problem.on_input else (jnp.ones_like(weight_T), weight_T)
        return outer_T[:, None] * own(index, inner_T[:, None] * x_TD, jnp)

    if problem.router.output is None:
        with_weights = jax.vmap(lambda index: of_expert(index, functools.partial(expert, weights, kind)))
        y_TD = jnp.sum(with_weights(jnp.arange(config.num_experts)), axis=0)
        for index in range(config.num_experts, len(worth_E)):
            y_TD = y_TD + of_expert(index, functools.partial(routed, config, weights, kind))
    y_TD = with_shared(config, weights, kind, x_TD, y_TD, jnp)
    real = jnp.maximum(real_T.sum(), 1)
    balance = (1 / worth_E).sum() * jnp.sum(worth_E * shares_TE * smooth.probability_TE * real_T[:, None]) / real
    z = jnp.sum(smooth.logsumexp_T**2 * real_T) / real
    return jnp.sum(y_TD**2) + LOAD_WEIGHT * balance + Z_WEIGHT * z + smooth.penalty / real
