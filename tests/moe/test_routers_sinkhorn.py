"""S-BASE: the plan by hand and by its marginals, the decision in training and in evaluation, gates and padding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.config import ConfigError
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers import RouterShape
from sparse_lm.moe.routers.base_layer import balanced_assignment
from sparse_lm.moe.routers.sinkhorn import Sinkhorn, SinkhornRouter, log_plan
from sparse_lm.moe.types import RouterInputs
from sparse_lm.sharding import DEFAULT

TRAINING = jax.random.key(0)


def plan_of(logits_SE, iterations: int = 30, mask=None):
    logits_GSE = jnp.asarray(logits_SE, jnp.float32)[None]
    mask_GS = jnp.ones(logits_GSE.shape[:2], bool) if mask is None else jnp.asarray(mask)[None]
    return np.exp(np.asarray(log_plan(logits_GSE, mask_GS, iterations))[0])


def route(logits_SE, key, top_k: int = 1, mask=None, **options):
    size, num_experts = np.shape(logits_SE)
    router = Sinkhorn(**options).build(jax.random.key(0), RouterShape(num_experts, num_experts, top_k), DEFAULT)
    assert isinstance(router, SinkhornRouter)
    router.scores.weight_DE[...] = jnp.eye(num_experts)
    mask_GS = jnp.ones((1, size), bool) if mask is None else jnp.asarray(mask)[None]
    x_GSD = jnp.asarray(logits_SE, jnp.float32)[None]
    decision, scores = router(RouterInputs(x_GSD, mask_GS, jnp.zeros((1, size), jnp.int32), size), key)
    return np.asarray(decision.expert_GSK[0]), np.asarray(decision.gate_GSK[0]), scores


def test_one_iteration_by_hand():
    """exp(logits) is [[1, 3], [1, 1]]: rows to 1 gives [[1/4, 3/4], [1/2, 1/2]], columns to 1 divides by 3/4 and 5/4:
    [[1/3, 3/5], [2/3, 2/5]], rows to 1 divides by 14/15 and 16/15."""
    plan = plan_of(np.log([[1.0, 3.0], [1.0, 1.0]]), iterations=1)
    np.testing.assert_allclose(plan, [[5 / 14, 9 / 14], [10 / 16, 6 / 16]], rtol=1e-5)


def test_the_limit_by_hand():
    """A 2 x 2 plan with equal marginals is [[p, 1-p], [1-p, p]]; scaling keeps the cross ratio, here 1 / 9."""
    plan = plan_of(np.log([[1.0, 3.0], [3.0, 1.0]]))
    np.testing.assert_allclose(plan, [[0.25, 0.75], [0.75, 0.25]], rtol=1e-5)
    plan = plan_of(np.log([[1.0, 9.0], [1.0, 1.0]]))  # p / (1 - p) = 1 / 3 again
    np.testing.assert_allclose(plan, [[0.25, 0.75], [0.75, 0.25]], rtol=1e-5)


@given(st.integers(0, 2**31 - 1), st.integers(2, 12), st.integers(2, 5))
def test_marginals_and_cross_ratios(seed, size, num_experts):
    rng = np.random.default_rng(seed)
    logits_SE = rng.normal(size=(size, num_experts))
    mask = np.arange(size) != 1
    plan = plan_of(logits_SE, 200, mask)[mask]
    np.testing.assert_allclose(plan.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(plan.sum(0), mask.sum() / num_experts, rtol=1e-3)
    ratio = np.log(plan) - logits_SE[mask]
    np.testing.assert_allclose(ratio - ratio[:1] - ratio[:, :1] + ratio[0, 0], 0, atol=1e-4)


def test_equal_preferences_are_decided_by_the_load_in_training_alone():
    """All prefer expert 0, the last token least: the plan sends it, and one more, to expert 1."""
    logits_SE = [[4.0, 0.0], [3.0, 0.0], [2.0, 0.0], [1.0, 0.0]]
    trained, gate_SK, scores = route(logits_SE, TRAINING)
    np.testing.assert_array_equal(trained[:, 0], [0, 0, 1, 1])
    evaluated, _, _ = route(logits_SE, None)
    np.testing.assert_array_equal(evaluated[:, 0], [0, 0, 0, 0])
    probability_SE = np.asarray(scores.probability_GSE[0])
    np.testing.assert_allclose(gate_SK[:, 0], probability_SE[range(4), trained[:, 0]], rtol=1e-6)
    np.testing.assert_allclose(probability_SE[:, 1], 1 / (1 + np.exp([4, 3, 2, 1])), rtol=1e-5)
    np.testing.assert_allclose(scores.logsumexp_GS[0], np.log(1 + np.exp([4.0, 3, 2, 1])), rtol=1e-5)


def test_two_choices_come_best_first_and_are_not_renormalised():
    expert_SK, gate_SK, _ = route(np.log([[0.1, 0.6, 0.3], [0.2, 0.2, 0.6], [0.7, 0.2, 0.1]]), TRAINING, 2)
    np.testing.assert_array_equal(expert_SK[:, 0], [1, 2, 0])
    np.testing.assert_allclose(gate_SK[:, 0], [0.6, 0.6, 0.7], rtol=1e-5)
    assert np.all(gate_SK.sum(1) < 1)


def test_loads_are_far_more_even_than_by_the_logits():
    rng = np.random.default_rng(0)
    logits_SE = rng.normal(size=(256, 8)) + np.linspace(0, 3, 8)
    loads = [np.bincount(route(logits_SE, key)[0][:, 0], minlength=8) for key in (TRAINING, None)]
    assert loads[0].max() < 1.5 * 32
    assert loads[1].max() > 3 * 32


def test_a_lower_temperature_is_closer_to_the_best_balanced_assignment():
    logits_SE = 0.1 * np.random.default_rng(1).normal(size=(64, 4)) + np.linspace(0, 0.5, 4)
    best = np.asarray(balanced_assignment(jnp.asarray(logits_SE[None], jnp.float32), jnp.ones((1, 64), bool)))[0]
    agreement = [
        np.mean(route(logits_SE, TRAINING, temperature=temperature, iterations=500)[0][:, 0] == best)
        for temperature in (1.0, 0.005)
    ]
    assert 0.5 < agreement[0] < agreement[1]
    assert agreement[1] > 0.95


def test_padding_takes_no_mass_and_a_group_of_padding_is_finite():
    logits_SE = np.array([[4.0, 0.0], [3.0, 0.0], [9.0, 0.0], [9.0, 0.0]])
    expert_SK, gate_SK, _ = route(logits_SE, TRAINING, mask=[True, True, False, False])
    np.testing.assert_array_equal(expert_SK[:, 0], [0, 1, -1, -1])
    assert np.all(gate_SK[2:] == 0)
    assert np.all(np.isfinite(np.log(np.maximum(plan_of(logits_SE, 30, [False] * 4), 1e-30))))
    expert_SK, _, _ = route(logits_SE, TRAINING, mask=[False] * 4)
    assert np.all(expert_SK == -1)


def test_large_logits_stay_finite():
    plan = plan_of(np.array([[1e4, 0.0], [0.0, 1e4], [1e4, -1e4]]))
    assert np.all(np.isfinite(plan))
    np.testing.assert_allclose(plan.sum(1), 1, rtol=1e-5)


def test_no_gradient_through_the_plan():
    router = Sinkhorn(init_scale=4.0).build(jax.random.key(0), RouterShape(4, 3, 1), DEFAULT)
    inputs = RouterInputs(
        jax.random.normal(jax.random.key(1), (1, 6, 4)), jnp.ones((1, 6), bool), jnp.zeros((1, 6), jnp.int32), 2
    )

    def fixed(router):
        decision, scores = router(inputs, TRAINING)
        chosen = jnp.take_along_axis(scores.probability_GSE, jax.lax.stop_gradient(decision.expert_GSK), axis=-1)
        return jnp.sum(decision.gate_GSK**2) - jnp.sum(chosen**2)

    assert np.all(np.asarray(jax.tree.leaves(jax.grad(fixed)(router))[0]) == 0)


def test_it_is_not_causal_and_has_bounds():
    assert not MoEConfig(router=Sinkhorn(), allow_non_causal=True).causal
    cases: list[dict[str, Any]] = [{"iterations": 0}, {"temperature": 0.0}, {"init_scale": 0.0}]
    for options in cases:
        with pytest.raises(ConfigError, match=next(iter(options))):
            Sinkhorn(**options)
