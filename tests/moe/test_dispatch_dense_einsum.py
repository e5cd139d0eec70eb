"""The two plain dispatchers against a program with loops, with every kind of assignment present."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.moe.dispatch.dense import Dense
from sparse_lm.moe.dispatch.einsum import Einsum
from sparse_lm.moe.experts import Experts
from sparse_lm.moe.slots import SlotRule, place
from sparse_lm.moe.types import TokenChoice
from sparse_lm.sharding import DEFAULT

# Compiled, with the dispatcher as a constant.
run = jax.jit(lambda dispatcher, *inputs: dispatcher(*inputs), static_argnums=0)

GROUPS, SIZE, WIDTH, EXPERTS, TOP_K = 2, 5, 4, 3, 2


def random_decision(seed: int) -> TokenChoice:
    rng = np.random.default_rng(seed)
    expert = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(GROUPS * SIZE)]).reshape(GROUPS, SIZE, TOP_K)
    expert = np.where(rng.random(expert.shape) < 0.2, -1, expert)
    gate = np.where(expert >= 0, rng.random(expert.shape), 0)
    return TokenChoice(jnp.asarray(expert), jnp.asarray(gate, jnp.float32))


def looped(experts: Experts, x_GSD, decision: TokenChoice, rule: SlotRule):
    placement = jax.tree.map(np.asarray, jax.jit(place, static_argnums=(1, 2))(decision, EXPERTS, rule))
    up, down = np.asarray(experts.up_EDF[...]), np.asarray(experts.down_EFD[...])
    y_GSD = np.zeros(x_GSD.shape)
    for g, s, k in np.ndindex(GROUPS, SIZE, TOP_K):
        if placement.slot_GSK[g, s, k] >= 0:
            e = int(decision.expert_GSK[g, s, k])
            hidden = np.maximum(np.asarray(x_GSD[g, s]) @ up[e], 0)
            y_GSD[g, s] += float(placement.gate_GSK[g, s, k]) * hidden @ down[e]
    return y_GSD, np.asarray(placement.slot_GSK) >= 0


@pytest.mark.parametrize("cls", [Dense, Einsum])
@hypothesis.settings(max_examples=6)
@hypothesis.given(seed=st.integers(0, 1000), slots=st.sampled_from([1, 5]), renormalise=st.booleans())
def test_equals_the_loop(cls, seed, slots, renormalise):
    experts = Experts(jax.random.key(0), (EXPERTS, WIDTH, 3), "relu")
    x_GSD, decision = jax.random.normal(jax.random.key(seed), (GROUPS, SIZE, WIDTH)), random_decision(seed)
    rule = SlotRule(slots, "token", renormalise)
    y_GSD, kept_GSK = run(cls(rule, DEFAULT), experts, x_GSD, decision)
    expected, kept = looped(experts, x_GSD, decision, rule)
    np.testing.assert_array_equal(kept_GSK, kept)
    np.testing.assert_allclose(y_GSD, expected, rtol=1e-4, atol=1e-6)


def test_both_drop_the_same_hidden_values():
    experts = Experts(jax.random.key(0), (EXPERTS, WIDTH, 3), "gelu", dropout_rate=0.5)
    x_GSD, decision = jax.random.normal(jax.random.key(1), (GROUPS, SIZE, WIDTH)), random_decision(1)
    dense, einsum = (
        run(cls(SlotRule(2), DEFAULT), experts, x_GSD, decision, jax.random.key(5))[0] for cls in (Dense, Einsum)
    )
    np.testing.assert_allclose(dense, einsum, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", [Dense, Einsum])
def test_a_dropped_token_sends_no_gradient_to_its_expert(cls):
    experts = Experts(jax.random.key(0), (EXPERTS, WIDTH, 3), "gelu")
    decision = TokenChoice(jnp.zeros((1, 3, 1), jnp.int32), jnp.ones((1, 3, 1)))

    def total(x_GSD):
        return run(cls(SlotRule(2), DEFAULT), experts, x_GSD, decision)[0].sum()

    gradient = np.asarray(jax.grad(total)(jax.random.normal(jax.random.key(1), (1, 3, WIDTH))))
    assert np.all(np.abs(gradient[0, :2]).max(-1) > 0)
    assert np.all(gradient[0, 2] == 0)
