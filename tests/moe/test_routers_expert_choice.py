"""Expert choice: who is taken, by hand and by brute force; gates, padding, ties, and what it refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.config import ConfigError
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers import RouterShape
from sparse_lm.moe.routers.expert_choice import ExpertChoice, ExpertChoiceRouter, highest
from sparse_lm.moe.types import RouterInputs
from sparse_lm.sharding import DEFAULT

# Rows are tokens; each sums to 1.
PROBABILITY = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.2, 0.3, 0.5]])


def route(probability=PROBABILITY, slots: int = 2, mask=None, dtype=jnp.float32):
    """Experts, gates and scores of one group whose tokens have these probabilities (logits plus 1)."""
    size, num_experts = probability.shape
    router = ExpertChoice().build(jax.random.key(0), RouterShape(num_experts, num_experts, 1), DEFAULT)
    assert isinstance(router, ExpertChoiceRouter)
    router.scores.weight_DE[...] = jnp.eye(num_experts)
    x_GSD = jnp.asarray(np.log(probability) + 1.0, dtype)[None]
    mask_GS = jnp.ones((1, size), bool) if mask is None else jnp.asarray(mask)[None]
    decision, scores = router(RouterInputs(x_GSD, mask_GS, jnp.zeros((1, size), jnp.int32), slots), None)
    return np.asarray(decision.expert_GSK[0]), np.asarray(decision.gate_GSK[0]), scores


def test_by_hand():
    """Expert 0 takes tokens 0, 1; expert 1 takes 1 and, on a tie with nobody, 3; expert 2 takes 3 and 2."""
    expert_SK, gate_SK, scores = route()
    np.testing.assert_array_equal(expert_SK, [[0, -1, -1], [0, 1, -1], [-1, -1, 2], [-1, 1, 2]])
    np.testing.assert_allclose(gate_SK, [[0.7, 0, 0], [0.6, 0.3, 0], [0, 0, 0.4], [0, 0.3, 0.5]], rtol=1e-5)
    np.testing.assert_allclose(scores.probability_GSE[0], PROBABILITY, rtol=1e-5)
    np.testing.assert_allclose(scores.logsumexp_GS[0], 1.0, rtol=1e-5)


def test_padding_is_taken_by_nobody_even_when_slots_stay_empty():
    expert_SK, gate_SK, _ = route(mask=[False, True, False, False])
    np.testing.assert_array_equal(expert_SK, [[-1] * 3, [0, 1, 2], [-1] * 3, [-1] * 3])
    assert np.all(gate_SK[[0, 2, 3]] == 0)


def test_ties_go_to_the_earlier_token():
    expert_SK, _, _ = route(np.full((4, 2), 0.5))
    np.testing.assert_array_equal(expert_SK, [[0, 1], [0, 1], [-1, -1], [-1, -1]])


def test_slots_for_all_are_a_dense_layer():
    expert_SK, gate_SK, _ = route(slots=4)
    assert np.all(expert_SK == [0, 1, 2])
    np.testing.assert_allclose(gate_SK.sum(-1), 1, rtol=1e-6)


def test_decisions_in_float32_of_a_bfloat16_input():
    expert_SK, gate_SK, scores = route(dtype=jnp.bfloat16)
    assert gate_SK.dtype == np.float32
    assert scores.probability_GSE.dtype == jnp.float32
    assert np.bincount(expert_SK[expert_SK >= 0]).tolist() == [2, 2, 2]


@given(st.integers(0, 2**31 - 1), st.integers(1, 7), st.integers(1, 9))
def test_highest_equals_sorting_one_by_one(seed, slots, size):
    rng = np.random.default_rng(seed)
    score_GSE = np.round(rng.random((2, size, 3)), 1).astype(np.float32)  # with ties
    mask_GS = rng.random((2, size)) < 0.7
    got = np.asarray(highest(jnp.asarray(score_GSE), jnp.asarray(mask_GS), slots))
    for group in range(2):
        for expert in range(3):
            real = [token for token in range(size) if mask_GS[group, token]]
            best = sorted(real, key=lambda token, g=group, e=expert: -score_GSE[g, token, e])[:slots]
            np.testing.assert_array_equal(np.flatnonzero(got[group, :, expert]), sorted(best))


def test_gradient_reaches_the_weights_through_the_gates_alone():
    router = ExpertChoice(init_scale=4.0).build(jax.random.key(0), RouterShape(4, 3, 1), DEFAULT)
    inputs = RouterInputs(
        jax.random.normal(jax.random.key(1), (1, 6, 4)), jnp.ones((1, 6), bool), jnp.zeros((1, 6), jnp.int32), 2
    )

    def gates(router):
        return jnp.sum(router(inputs, None)[0].gate_GSK ** 2)

    gradient = jax.tree.leaves(jax.grad(gates)(router))[0]
    assert np.all(np.isfinite(gradient))
    assert np.abs(gradient).max() > 1e-3


def test_it_says_that_it_is_not_causal_and_needs_a_capacity():
    assert not MoEConfig(router=ExpertChoice(), allow_non_causal=True).causal
    for name in ("capacity_factor", "capacity_factor_eval"):
        with pytest.raises(ConfigError, match=rf"config\.{name}=None.*expert_choice would take all tokens; set a num"):
            MoEConfig(**{"router": ExpertChoice(), name: None})
