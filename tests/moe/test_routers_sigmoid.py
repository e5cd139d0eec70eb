"""Sigmoid routing: scores, bias, groups and gates by hand; the update of the bias; what is refused."""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_lm.config import ConfigError
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers import RouterShape
from sparse_lm.moe.routers.sigmoid import Sigmoid, SigmoidRouter
from sparse_lm.moe.types import RouterInputs, RouterStats
from sparse_lm.sharding import DEFAULT

SCORE = (0.9, 0.2, 0.6, 0.5, 0.7, 0.4, 0.8, 0.1)  # of experts 0 to 7; as pairs: (0, 1), (2, 3), (4, 5), (6, 7)


def build(config: Sigmoid, top_k: int = 2, num_experts: int = 8) -> SigmoidRouter:
    router = config.build(jax.random.key(0), RouterShape(num_experts, num_experts, top_k), DEFAULT)
    assert isinstance(router, SigmoidRouter)
    return router


def route(config: Sigmoid, top_k: int = 2, bias=None, logits=None, mask=(True, False), key=None):
    """Two tokens with the scores of `SCORE`, of which the second is padding."""
    router = build(config, top_k)
    logits = [math.log(score / (1 - score)) for score in SCORE] if logits is None else logits
    router.scores.weight_DE[...] = jnp.diag(jnp.asarray(logits, jnp.float32))
    if bias is not None:
        router.bias_E[...] = jnp.asarray(bias, jnp.float32)
    inputs = RouterInputs(jnp.ones((1, 2, 8)), jnp.asarray([mask]), jnp.zeros((1, 2), jnp.int32), 2)
    decision, scores = jax.jit(lambda router, inputs, key: router(inputs, key))(router, inputs, key)
    return np.asarray(decision.expert_GSK[0]), np.asarray(decision.gate_GSK[0]), scores


BIAS = (0.0, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.75)  # expert 1 becomes 1.1 and expert 7 0.85, so that 6 comes fourth


@pytest.mark.parametrize(
    ("options", "top_k", "bias", "experts", "gates"),
    [
        ({"renormalise": "none", "scale": 1.0}, 3, None, [0, 6, 4], [0.9, 0.8, 0.7]),
        ({"renormalise": "none", "scale": 16.0}, 1, None, [0], [14.4]),
        ({}, 2, None, [0, 6], [2.5 * 9 / 17, 2.5 * 8 / 17]),
        ({"scale": 2.827}, 2, None, [0, 6], [2.827 * 9 / 17, 2.827 * 8 / 17]),
        ({"renormalise": "after_drop", "scale": 1.0}, 2, None, [0, 6], [0.9, 0.8]),  # the dispatcher does it
        ({"renormalise": "none", "scale": 1.0}, 3, BIAS, [1, 0, 7], [0.2, 0.9, 0.1]),
        ({}, 2, BIAS, [1, 0], [2.5 * 2 / 11, 2.5 * 9 / 11]),
    ],
)
def test_choices_and_gates_by_hand(options: dict[str, Any], top_k, bias, experts, gates):
    expert_SK, gate_SK, _ = route(Sigmoid(**options), top_k, bias)
    np.testing.assert_array_equal(expert_SK, [experts, [-1] * top_k])
    np.testing.assert_allclose(gate_SK, [gates, [0] * top_k], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "bias", "experts"),
    [
        # The best of each pair: 0.9, 0.6, 0.7, 0.8.
        ({"num_groups": 4, "groups_kept": 2, "group_score": "max"}, None, [0, 6, 1]),
        ({"num_groups": 4, "groups_kept": 3, "group_score": "max"}, None, [0, 6, 4]),
        ({"num_groups": 4, "groups_kept": 4, "group_score": "max"}, None, [0, 6, 4]),
        # Sums of the biased scores of each pair: 1.1, 1.2, 1.0, 0.92 and 1.1, 1.2, 1.0, 1.35.
        ({"num_groups": 4, "groups_kept": 2}, (0, 0, 0.1, 0, 0, -0.1, 0, 0.02), [0, 2, 3]),
        ({"num_groups": 4, "groups_kept": 2}, (0, 0, 0.1, 0, 0, -0.1, 0, 0.45), [6, 2, 7]),
        # Sums of the two best of each half: 1.55, 1.5 and 1.5, 1.6.
        ({"num_groups": 2, "groups_kept": 1}, (0, 0, 0.05, 0, 0, 0, 0, 0), [0, 2, 3]),
        ({"num_groups": 2, "groups_kept": 1}, (0, 0, 0, 0, 0.1, 0, 0, 0), [4, 6, 5]),
        # Groups of one expert.
        ({"num_groups": 8, "groups_kept": 3}, None, [0, 6, 4]),
        # All biased scores are negative, and still nobody outside the group is chosen.
        ({"num_groups": 2, "groups_kept": 1}, (-2, -2, -2, -2, -3, -3, -3, -3), [0, 2, 3]),
    ],
)
def test_groups_by_hand(options: dict[str, Any], bias, experts):
    expert_SK, _, _ = route(Sigmoid(**options), 3, bias)
    np.testing.assert_array_equal(expert_SK[0], experts)


def test_deepseek_v2_multiplies_its_softmax_and_takes_three_devices():
    probability = np.array([0.3, 0.02, 0.2, 0.05, 0.18, 0.04, 0.15, 0.06])
    config = Sigmoid("softmax", "none", 16.0, 4, 3, "max", bias_rate=0.0)
    expert_SK, gate_SK, scores = route(config, 4, logits=np.log(probability) + 2.0)
    np.testing.assert_array_equal(expert_SK[0], [0, 2, 4, 3])  # 6, with 0.15, is on the fourth device
    np.testing.assert_allclose(gate_SK[0], 16 * probability[[0, 2, 4, 3]], rtol=1e-5)
    np.testing.assert_allclose(scores.probability_GSE[0, 0], probability, rtol=1e-5)
    np.testing.assert_allclose(scores.logsumexp_GS[0, 0], 2.0, rtol=1e-5)


def test_statistics_are_scores_over_their_sum_and_see_no_bias():
    for config, bias in ((Sigmoid(), None), (Sigmoid(), BIAS), (Sigmoid(renormalise="none"), BIAS)):
        _, _, scores = route(config, 2, bias)
        np.testing.assert_allclose(scores.probability_GSE[0, 0], np.array(SCORE) / sum(SCORE), rtol=1e-5)
        total = sum(score / (1 - score) for score in SCORE)
        np.testing.assert_allclose(scores.logsumexp_GS[0, 0], math.log(total), rtol=1e-5)


def test_scores_too_small_for_float32_give_no_nan():
    _, gate_SK, scores = route(Sigmoid(), 2, logits=[-150.0] * 8)
    assert np.all(np.isfinite(gate_SK))
    assert np.all(np.isfinite(scores.probability_GSE))


def test_training_is_as_quiet_as_evaluation():
    for one, two in zip(route(Sigmoid()), route(Sigmoid(), key=jax.random.key(1)), strict=True):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
            np.testing.assert_array_equal(a, b)


# The update of the bias


def stats_of(load) -> RouterStats:
    """The statistics of a batch with these loads, in one unit."""
    zero, none = jnp.zeros((1,), jnp.int32), jnp.zeros((1,), jnp.float32)
    load_UE = jnp.asarray([load], jnp.int32)
    return RouterStats(zero, zero, zero, load_UE, jnp.zeros(load_UE.shape, jnp.float32), none, none, none)


@pytest.mark.parametrize(
    ("options", "load", "bias"),
    [
        ({}, [10, 2, 4, 8], [-0.001, 0.001, 0.001, -0.001]),  # mean 6
        ({"bias_rate": 0.5}, [5, 5, 5, 5], [0, 0, 0, 0]),
        ({"bias_rate": 0.5}, [5, 4, 6, 5], [0, 0.5, -0.5, 0]),
        ({"bias_rate": 0.5, "bias_rule": "linear"}, [10, 2, 4, 8], [-1 / 3, 1 / 3, 1 / 6, -1 / 6]),
        ({"bias_rate": 0.5, "bias_rule": "linear"}, [0, 0, 0, 0], [0, 0, 0, 0]),
        ({"bias_rate": 0.0}, [10, 2, 4, 8], [0, 0, 0, 0]),
        ({}, [2**30, 2**30 - 256, 2**30 - 128, 2**30 - 128], [-0.001, 0.001, 0, 0]),  # four of them overflow int32
    ],
)
def test_bias_by_hand(options: dict[str, Any], load, bias):
    router = build(Sigmoid(**options), num_experts=4)
    new = router.updated(stats_of(load))
    np.testing.assert_allclose(new.bias_E[...], bias, rtol=1e-6)
    np.testing.assert_array_equal(router.bias_E[...], 0)  # the old router stays as it was
    twice = new.updated(stats_of(load))
    np.testing.assert_allclose(twice.bias_E[...], 2 * np.array(bias), rtol=1e-6)
    np.testing.assert_array_equal(twice.scores.weight_DE[...], router.scores.weight_DE[...])


@hypothesis.given(st.lists(st.integers(0, 1000), min_size=4, max_size=4), st.sampled_from(["sign", "linear"]))
def test_the_bias_goes_against_the_load(load, rule):
    new = build(Sigmoid(bias_rate=0.01, bias_rule=rule), num_experts=4).updated(stats_of(load))
    bias, order = np.asarray(new.bias_E[...]), np.argsort(load)
    assert np.all(np.diff(bias[order]) <= 0)
    np.testing.assert_array_equal(np.sign(bias), np.sign(np.mean(load) - np.array(load)))
    if rule == "linear":
        np.testing.assert_allclose(bias.sum(), 0, atol=1e-7)


@pytest.mark.parametrize("rule", ["sign", "linear"])
def test_the_bias_balances_a_router_that_does_not_learn(rule):
    """Tokens that favour two of eight experts; the largest violation of balance falls from over 2 to under 0.3."""
    router = build(Sigmoid(bias_rate=0.02, bias_rule=rule), 2)
    preference = np.array([2.0, 1.5, 0, 0, 0, -0.5, -0.5, -1.0])
    router.scores.weight_DE[...] = jnp.eye(8)
    x_GSD = jnp.asarray(np.random.default_rng(0).normal(size=(4, 128, 8)) + preference, jnp.float32)
    inputs = RouterInputs(x_GSD, jnp.ones((4, 128), bool), jnp.zeros((4, 128), jnp.int32), 128)

    @jax.jit
    def step(router, _):
        decision, _ = router(inputs, None)
        load_E = jnp.sum(decision.expert_GSK[..., None] == jnp.arange(8), axis=(0, 1, 2))
        return router.updated(stats_of(load_E)), jnp.max(load_E) / jnp.mean(load_E) - 1

    violation = np.asarray(jax.lax.scan(step, router, jnp.arange(150))[1])
    assert violation[0] > 2
    assert violation[-10:].max() < 0.3


def test_no_gradient_goes_through_the_choice_or_into_the_bias():
    router = build(Sigmoid(renormalise="none", scale=1.0))

    def gates(router, x_GSD):
        inputs = RouterInputs(x_GSD, jnp.ones((1, 4), bool), jnp.zeros((1, 4), jnp.int32), 4)
        return router(inputs, None)[0].gate_GSK.sum()

    gradient = jax.grad(gates)(router, jax.random.normal(jax.random.key(1), (1, 4, 8)))
    np.testing.assert_array_equal(gradient.bias_E[...], 0)
    assert np.abs(gradient.scores.weight_DE[...]).max() > 0


# What is refused


@pytest.mark.parametrize(
    ("options", "shape", "key"),
    [
        ({}, (8, 1), "renormalise"),
        ({"renormalise": "after_drop", "scale": 1.0}, (8, 1), "renormalise"),
        ({"num_groups": 3, "groups_kept": 3}, (8, 2), "num_groups"),
        ({"num_groups": 4, "groups_kept": 1}, (8, 3), "groups_kept"),
    ],
)
def test_layers_it_cannot_serve(options: dict[str, Any], shape, key):
    with pytest.raises(ConfigError) as error:
        Sigmoid(**options).check_shape(RouterShape(4, *shape))
    assert error.value.key == key
    assert "use" in error.value.why
    with pytest.raises(ConfigError, match=f"router.{key}"):
        MoEConfig(num_experts=shape[0], top_k=shape[1], router=Sigmoid(**options))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"num_groups": 4, "groups_kept": 5}, "groups_kept"),
        ({"renormalise": "after_drop"}, "scale"),
        ({"scale": 0.0}, "scale"),
        ({"bias_rate": -0.1}, "bias_rate"),
        ({"num_groups": 0}, "num_groups"),
        ({"score": "tanh"}, "score"),
    ],
)
def test_options_that_contradict_or_are_out_of_bounds(options: dict[str, Any], key):
    with pytest.raises(ConfigError) as error:
        Sigmoid(**options)
    assert error.value.key == key


@pytest.mark.parametrize(("options", "top_k"), [({"renormalise": "none"}, 1), ({}, 8), ({"num_groups": 8}, 1)])
def test_the_rest_is_accepted(options: dict[str, Any], top_k):
    config = Sigmoid(**{"renormalise": "none", "groups_kept": options.get("num_groups", 1), **options})
    config.check_shape(RouterShape(4, 8, top_k))
    assert config.causal
