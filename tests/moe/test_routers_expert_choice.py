"""Expert choice: who is taken, by hand and by brute force; gates, padding, ties, and what it refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.config import ConfigError
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers import RouterShape
from sparse_lm.moe.routers.expert_choice import (
    Assignment,
    ExpertChoice,
    ExpertChoiceRouter,
    highest,
    log_assignment,
)
from sparse_lm.moe.types import RouterInputs
from sparse_lm.sharding import DEFAULT

# Rows are tokens; each sums to 1.
PROBABILITY = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.2, 0.3, 0.5]])


def route(probability=PROBABILITY, slots: int = 2, mask=None, dtype=jnp.float32, config: ExpertChoice | None = None):
    """Experts, gates and scores of one group whose tokens have these probabilities (logits plus 1)."""
    size, num_experts = probability.shape
    config = config or ExpertChoice()
    router = config.build(jax.random.key(0), RouterShape(num_experts, num_experts, 1), DEFAULT)
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


# At most b experts per token


def scores(seed: int, size: int, num_experts: int, scale: float = 4.0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(size, num_experts)) * scale
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def assigned(score_SE, rule: Assignment, mask=None) -> np.ndarray:
    """A, cut off at 1, of one group."""
    mask_GS = jnp.ones((1, len(score_SE)), bool) if mask is None else jnp.asarray(mask)[None]
    log_GSE = log_assignment(jnp.asarray(score_SE, jnp.float32)[None], mask_GS, rule)
    return np.minimum(np.exp(np.asarray(log_GSE[0], np.float64)), 1.0)


def best_value(score_SE, slots: int, limit: int) -> float:
    """The value of the linear programme without the entropy, by a solver of such."""
    size, num_experts = score_SE.shape
    of_expert = np.tile(np.eye(num_experts), size)
    of_token = np.repeat(np.eye(size), num_experts, axis=1)
    found = scipy.optimize.linprog(
        -score_SE.ravel(), of_token, np.full(size, limit), of_expert, np.full(num_experts, slots), (0, 1)
    )
    return -found.fun


@pytest.mark.parametrize(("size", "num_experts", "slots", "limit"), [(8, 4, 4, 2), (32, 8, 8, 3), (64, 8, 16, 2)])
def test_the_assignment_solves_the_linear_programme(size, num_experts, slots, limit):
    """Within the entropy's weight times its largest value, and each constraint within a hundredth of a token."""
    score_SE, entropy = scores(0, size, num_experts), 0.01
    a_SE = assigned(score_SE, Assignment(slots, limit, entropy, 1500))
    np.testing.assert_allclose(a_SE.sum(0), slots, atol=0.02)
    assert a_SE.sum(1).max() < limit + 0.01
    value = best_value(score_SE, slots, limit)
    most = entropy * -np.sum(np.where(a_SE > 0, a_SE * np.log(np.maximum(a_SE, 1e-30)), 0))
    assert value - most - 0.03 <= np.sum(score_SE * a_SE) <= value + 0.03
    # The limit does bind: without it experts would do better.
    assert value < np.sort(score_SE, axis=0)[-slots:].sum() - 0.01


def test_the_assignment_by_hand():
    """Two experts of one token each and two tokens that both rather see expert 0, with a limit of one expert.

    A = [[p, 1 - p], [1 - p, p]] by its sums, and p / (1 - p) = exp((0.8 + 0.4 - 0.6 - 0.2) / (2 * 0.5)) = exp(0.4).
    """
    score_SE = np.array([[0.8, 0.2], [0.6, 0.4]])
    p = 1 / (1 + np.exp(-0.4))
    a_SE = assigned(score_SE, Assignment(1, 1, 0.5, 200))
    np.testing.assert_allclose(a_SE, [[p, 1 - p], [1 - p, p]], atol=1e-5)
    unlimited = route(score_SE, slots=1)[0]
    np.testing.assert_array_equal(unlimited, [[0, -1], [-1, 1]])


def test_a_limited_token_gives_its_place_to_another():
    """Token 0 is the favourite of both experts and may have one: expert 0 keeps it, expert 1 takes its next best."""
    score_SE = np.array([[0.55, 0.45, 0.0], [0.1, 0.4, 0.5], [0.2, 0.3, 0.5], [0.0, 0.1, 0.9]]) + 1e-6
    np.testing.assert_array_equal(route(score_SE, 1)[0][0], [0, 1, -1])
    expert_SK, gate_SK, _ = route(score_SE, 1, config=ExpertChoice(max_experts=1, iterations=1000))
    np.testing.assert_array_equal(expert_SK, [[0, -1, -1], [-1, 1, -1], [-1, -1, -1], [-1, -1, 2]])
    np.testing.assert_allclose(gate_SK[[0, 1, 3], [0, 1, 2]], [0.55, 0.4, 0.9], atol=1e-5)


@given(st.integers(0, 2**31 - 1), st.sampled_from([(1, 2), (2, 4), (2, 7), (3, 5)]), st.booleans())
def test_no_token_has_more_experts_than_the_limit_and_no_expert_more_tokens_than_slots(seed, limit_slots, converged):
    limit, slots = limit_slots
    mask = np.random.default_rng(seed).random(12) < 0.8
    config = ExpertChoice(max_experts=limit, iterations=300 if converged else 1)
    expert_SK, gate_SK, _ = route(scores(seed, 12, 4), slots, mask, config=config)
    assert (expert_SK >= 0).sum(1).max() <= limit
    assert (expert_SK >= 0).sum(0).max() <= slots
    assert np.all(expert_SK[~mask] == -1)
    np.testing.assert_array_equal(gate_SK > 0, expert_SK >= 0)


def test_how_many_tokens_the_relaxation_leaves_above_the_limit():
    """64 tokens, at most two of 8 experts each, 16 slots: converging helps, and the rule ends it."""
    score_SE, above, empty = scores(0, 64, 8), {}, {}
    for name, iterations in (("unlimited", 0), ("hundred", 100), ("converged", 2000)):
        score_GSE, mask_GS = jnp.asarray(score_SE, jnp.float32)[None], jnp.ones((1, 64), bool)
        if iterations:
            score_GSE = log_assignment(score_GSE, mask_GS, Assignment(16, 2, 0.01, iterations))
        above[name] = int((np.asarray(highest(score_GSE, mask_GS, 16)).sum(-1) > 2).sum())
        expert_SK, _, _ = route(score_SE, 16, config=ExpertChoice(max_experts=2, iterations=max(iterations, 1)))
        assert (expert_SK >= 0).sum(1).max() <= 2
        empty[name] = 8 * 16 - int((expert_SK >= 0).sum())
    assert above["unlimited"] >= above["hundred"] > above["converged"] > 0
    assert empty["converged"] < empty["hundred"] < 0.2 * 8 * 16


def test_few_real_tokens_share_what_the_limit_leaves():
    """Two real tokens of at most one expert each, four experts: half a token per expert, and padding alone is fine."""
    mask = np.array([True, True, False, False, False, False])
    a_SE = assigned(scores(1, 6, 4), Assignment(3, 1, 0.1, 500), mask)
    np.testing.assert_allclose(a_SE[:2].sum(0), 0.5, atol=1e-3)
    np.testing.assert_allclose(a_SE[:2].sum(1), 1, atol=1e-3)
    expert_SK, gate_SK, _ = route(scores(1, 6, 4), 3, ~mask & mask, config=ExpertChoice(max_experts=1))
    assert np.all(expert_SK == -1) and np.all(gate_SK == 0)


def test_a_limit_that_limits_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"config\.router\.max_experts=8.*num_experts=8; set it lower, or to None"):
        MoEConfig(num_experts=8, router=ExpertChoice(max_experts=8))
    assert MoEConfig(num_experts=8, router=ExpertChoice(max_experts=7)).num_experts == 8
