"""BASE layers: the assignment is the best balanced one (against all of them), gates, initial centroids, refusals."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.config import ConfigError
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers import RouterShape
from sparse_lm.moe.routers.base_layer import Base, BaseRouter, balanced_assignment
from sparse_lm.moe.types import RouterInputs
from sparse_lm.sharding import DEFAULT

assign = jax.jit(balanced_assignment)
TRAINING = jax.random.key(0)


def best_total(affinity_SE, room: int) -> float:
    """The largest sum over all assignments, one by one."""
    size, num_experts = affinity_SE.shape
    allowed = (
        experts
        for experts in itertools.product(range(num_experts), repeat=size)
        if all(experts.count(expert) <= room for expert in range(num_experts))
    )
    return max(sum(affinity_SE[token, expert] for token, expert in enumerate(experts)) for experts in allowed)


@pytest.mark.parametrize(("size", "num_experts"), [(6, 3), (6, 2), (4, 4), (7, 3), (5, 1), (3, 5)])
def test_equals_brute_force(size, num_experts):
    rng = np.random.default_rng(size * 10 + num_experts)
    # A common preference for some experts, so that much has to be moved.
    affinity_GSE = rng.normal(size=(20, size, num_experts)) + 3 * rng.normal(size=(20, 1, num_experts))
    affinity_GSE = affinity_GSE.astype(np.float32)
    mask_GS = rng.random((20, size)) < 0.8
    expert_GS = np.asarray(assign(affinity_GSE, mask_GS))
    room = -(-size // num_experts)
    np.testing.assert_array_equal(expert_GS >= 0, mask_GS)
    for affinity_SE, real_S, expert_S in zip(affinity_GSE.astype(np.float64), mask_GS, expert_GS, strict=True):
        assert np.bincount(expert_S[real_S], minlength=num_experts).max() <= room
        total = sum(affinity_SE[token, expert_S[token]] for token in np.flatnonzero(real_S))
        np.testing.assert_allclose(total, best_total(affinity_SE[real_S], room), rtol=1e-6, atol=1e-6)


def test_a_chain_of_moves_by_hand():
    """Both of the first two want expert 0; the cheapest way out moves token 1 to expert 1, whose token 2 goes on to
    expert 2: losses 1 + 1, less than any single move to expert 2 (5)."""
    affinity = jnp.asarray([[[5.0, 0.0, 0.0], [5.0, 4.0, 0.0], [0.0, 5.0, 4.0]]])
    np.testing.assert_array_equal(assign(affinity, jnp.ones((1, 3), bool)), [[0, 1, 2]])


def test_without_a_surplus_every_token_gets_its_favourite():
    affinity = jnp.asarray([[[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [2.0, 1.0]]])
    np.testing.assert_array_equal(assign(affinity, jnp.ones((1, 4), bool)), [[1, 0, 1, 0]])


@given(st.integers(0, 2**31 - 1))
def test_equal_tokens_and_large_numbers_are_balanced_too(seed):
    rng = np.random.default_rng(seed)
    affinity = np.repeat(rng.normal(size=(1, 1, 4)) * 10.0 ** rng.integers(-3, 6), 16, axis=1).astype(np.float32)
    expert_S = np.asarray(assign(affinity, np.ones((1, 16), bool)))[0]
    np.testing.assert_array_equal(np.bincount(expert_S, minlength=4), [4, 4, 4, 4])


def test_larger_groups_satisfy_the_optimality_condition():
    """No exchange along any cycle of experts gains anything: with balanced loads that is being optimal."""
    rng = np.random.default_rng(3)
    affinity_SE = (rng.normal(size=(96, 6)) + np.linspace(0, 4, 6)).astype(np.float32)
    expert_S = np.asarray(assign(affinity_SE[None], np.ones((1, 96), bool)))[0]
    np.testing.assert_array_equal(np.bincount(expert_S, minlength=6), [16] * 6)
    own_S1 = affinity_SE[np.arange(96), expert_S][:, None]
    loss_EE = np.stack([(own_S1 - affinity_SE)[expert_S == expert].min(0) for expert in range(6)])
    for length in (2, 3, 4, 5, 6):
        for cycle in itertools.permutations(range(6), length):
            assert sum(loss_EE[a, b] for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True)) > -1e-5


def test_not_a_number_ends():
    affinity = jnp.full((1, 8, 2), jnp.nan)
    assert assign(affinity, jnp.ones((1, 8), bool)).shape == (1, 8)


def test_groups_do_not_influence_each_other():
    rng = np.random.default_rng(4)
    affinity_GSE = rng.normal(size=(4, 12, 3)).astype(np.float32)
    affinity_GSE[2] += [9.0, 0.0, 0.0]  # takes many more steps than the others
    together = np.asarray(assign(affinity_GSE, np.ones((4, 12), bool)))
    for group in range(4):
        alone = np.asarray(assign(affinity_GSE[group : group + 1], np.ones((1, 12), bool)))
        np.testing.assert_array_equal(together[group], alone[0])


def route(affinity_SE, key, mask=None):
    size, num_experts = np.shape(affinity_SE)
    router = Base().build(jax.random.key(0), RouterShape(num_experts, num_experts, 1), DEFAULT)
    assert isinstance(router, BaseRouter)
    router.scores.weight_DE[...] = jnp.eye(num_experts)
    mask_GS = jnp.ones((1, size), bool) if mask is None else jnp.asarray(mask)[None]
    x_GSD = jnp.asarray(affinity_SE, jnp.float32)[None]
    decision, scores = router(RouterInputs(x_GSD, mask_GS, jnp.zeros((1, size), jnp.int32), size), key)
    return np.asarray(decision.expert_GSK[0, :, 0]), np.asarray(decision.gate_GSK[0, :, 0]), scores


def test_training_is_balanced_and_evaluation_greedy():
    affinity_SE = [[2.0, 1.0], [3.0, -1.0], [0.5, 0.0], [1.0, 0.9]]
    expert_S, gate_S, scores = route(affinity_SE, TRAINING)
    np.testing.assert_array_equal(expert_S, [0, 0, 1, 1])  # losses by token: 1, 4, 0.5, 0.1
    np.testing.assert_allclose(gate_S, 1 / (1 + np.exp([-2.0, -3.0, 0.0, -0.9])), rtol=1e-5)
    expert_S, gate_S, _ = route(affinity_SE, None)
    np.testing.assert_array_equal(expert_S, [0, 0, 0, 0])
    np.testing.assert_allclose(gate_S, 1 / (1 + np.exp([-2.0, -3.0, -0.5, -1.0])), rtol=1e-5)
    np.testing.assert_allclose(scores.probability_GSE[0, 0], np.exp([2, 1]) / np.exp([2, 1]).sum(), rtol=1e-5)


@pytest.mark.parametrize("key", [TRAINING, None], ids=["training", "evaluation"])
def test_padding_gets_nothing(key):
    expert_S, gate_S, _ = route([[2.0, 1.0], [3.0, 0.0], [0.0, 0.0]], key, [True, False, True])
    assert expert_S[1] == -1
    assert gate_S[1] == 0
    assert np.all(expert_S[[0, 2]] >= 0)


def test_centroids_start_orthogonal():
    router = Base().build(jax.random.key(0), RouterShape(16, 4, 1), DEFAULT)
    assert isinstance(router, BaseRouter)
    weight_DE = np.asarray(router.scores.weight_DE[...])
    np.testing.assert_allclose(weight_DE.T @ weight_DE, 0.01 * np.eye(4), atol=1e-6)  # gain 0.1


def test_refusals():
    with pytest.raises(ConfigError, match=r"config\.router\.kind='base'.*one expert per token; top_k=2 must be 1"):
        MoEConfig(top_k=2, router=Base())
    with pytest.raises(ConfigError, match="gain"):
        Base(gain=0.0)
    assert not MoEConfig(router=Base(), allow_non_causal=True).causal
