"""Top-k routing: gates, renormalisation and the policies for the second expert, by hand and by frequency."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.config import ConfigError
from sparse_lm.moe.routers import RouterShape
from sparse_lm.moe.routers.top_k import TopK, TopKRouter
from sparse_lm.moe.types import RouterInputs
from sparse_lm.sharding import DEFAULT

PROBABILITY = np.array([0.1, 0.5, 0.05, 0.35])  # second choice: expert 3; its share is 0.35 / 0.85
SHARE = 0.35 / 0.85


def route(config: TopK, top_k: int, tokens: int = 1, key=None, mask=None, probability=PROBABILITY):
    """A router whose logits are log(probability), on equal tokens."""
    router = config.build(jax.random.key(0), RouterShape(4, 4, top_k), DEFAULT)
    assert isinstance(router, TopKRouter)
    router.scores.weight_DE[...] = jnp.diag(jnp.asarray(np.log(probability) + 1.0, jnp.float32))
    mask = jnp.ones((1, tokens), bool) if mask is None else mask
    inputs = RouterInputs(jnp.ones((1, tokens, 4)), mask, jnp.zeros((1, tokens), jnp.int32), tokens)
    decision, scores = jax.jit(lambda router, inputs, key: router(inputs, key))(router, inputs, key)
    return np.asarray(decision.expert_GSK[0]), np.asarray(decision.gate_GSK[0]), scores


@pytest.mark.parametrize(
    ("options", "gates"),
    [
        ({}, [0.5, 0.35]),
        ({"renormalise": "before_drop"}, [1 - SHARE, SHARE]),
        ({"renormalise": "after_drop"}, [0.5, 0.35]),  # the dispatcher does it, where drops are known
        ({"gate": "softmax_after"}, [1 - SHARE, SHARE]),
        ({"second_expert": "none"}, [0.5, 0.0]),
        ({"second_expert": "none", "renormalise": "before_drop"}, [1 - SHARE, 0.0]),
        ({"second_expert": "threshold", "second_threshold": 0.4}, [0.5, 0.35]),
        ({"second_expert": "threshold", "second_threshold": 0.42}, [0.5, 0.0]),
        ({"second_expert": "gshard"}, [0.5, 0.35]),
        ({"second_expert": "mesh_tf"}, [0.5, 0.35]),
    ],
)
def test_gates_by_hand(options: dict[str, Any], gates):
    expert_SK, gate_SK, _ = route(TopK(**options), 2)
    np.testing.assert_allclose(gate_SK[0], gates, rtol=1e-5)
    np.testing.assert_array_equal(expert_SK[0], [1, 3 if gates[1] else -1])


def test_scores_are_over_all_experts_and_see_no_policy():
    for config in (TopK(), TopK(gate="softmax_after"), TopK(second_expert="none")):
        _, _, scores = route(config, 2)
        np.testing.assert_allclose(scores.probability_GSE[0, 0], PROBABILITY, rtol=1e-5)
        np.testing.assert_allclose(scores.logsumexp_GS[0, 0], 1.0, rtol=1e-5)  # log(sum p) + 1


def test_choices_come_best_first_and_ties_go_to_the_lower_expert():
    expert_SK, gate_SK, _ = route(TopK(), 4)
    np.testing.assert_array_equal(expert_SK[0], [1, 3, 0, 2])
    np.testing.assert_allclose(gate_SK[0], [0.5, 0.35, 0.1, 0.05], rtol=1e-5)
    expert_SK, _, _ = route(TopK(), 2, probability=np.full(4, 0.25))
    np.testing.assert_array_equal(expert_SK[0], [0, 1])


TOKENS = 20_000


@pytest.mark.parametrize(
    ("options", "probability", "expected"),
    [
        ({"second_expert": "gshard"}, PROBABILITY, 2 * SHARE),
        ({"second_expert": "mesh_tf", "second_threshold": 0.8}, PROBABILITY, SHARE / 0.8),
        ({"second_expert": "mesh_tf"}, PROBABILITY, 1.0),
        ({"second_expert": "gshard"}, np.array([0.04, 0.9, 0.01, 0.05]), 2 * 0.05 / 0.95),
    ],
)
def test_random_policies_use_the_second_expert_as_often_as_they_say(options: dict[str, Any], probability, expected):
    expert_SK, _, _ = route(TopK(**options), 2, TOKENS, jax.random.key(1), probability=probability)
    assert np.all(expert_SK[:, 0] == 1)
    frequency = np.mean(expert_SK[:, 1] == 3)
    np.testing.assert_allclose(frequency, expected, atol=4 * (expected * (1 - expected) / TOKENS) ** 0.5 + 1e-9)


def test_random_policies_keep_all_in_evaluation_and_repeat_with_a_key():
    config = TopK(second_expert="gshard")
    evaluation, _, _ = route(config, 2, 100)
    assert np.all(evaluation[:, 1] == 3)
    draws = [route(config, 2, 100, jax.random.key(seed))[0] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


def test_a_policy_applies_to_all_choices_after_the_first():
    expert_SK, _, _ = route(TopK(second_expert="threshold", second_threshold=0.2), 4)
    np.testing.assert_array_equal(expert_SK[0], [1, 3, -1, -1])  # 0.1 / 0.85 and 0.05 / 0.85 are below
    expert_SK, _, _ = route(TopK(second_expert="none"), 4)
    np.testing.assert_array_equal(expert_SK[0], [1, -1, -1, -1])


def test_padding_gets_no_expert():
    expert_SK, gate_SK, _ = route(TopK(), 2, 3, mask=jnp.asarray([[True, False, True]]))
    np.testing.assert_array_equal(expert_SK, [[1, 3], [-1, -1], [1, 3]])
    assert np.all(gate_SK[1] == 0)


def test_no_gradient_through_the_decision_of_a_policy():
    router = TopK(second_expert="threshold").build(jax.random.key(0), RouterShape(4, 4, 2), DEFAULT)

    def second_gate(x_GSD):
        inputs = RouterInputs(x_GSD, jnp.ones((1, 8), bool), jnp.zeros((1, 8), jnp.int32), 8)
        return router(inputs, None)[0].gate_GSK[..., 1].sum()

    gradient = jax.grad(second_gate)(jax.random.normal(jax.random.key(1), (1, 8, 4)))
    assert np.all(np.isfinite(gradient))
    assert np.abs(gradient).max() > 0


@pytest.mark.parametrize(
    ("options", "top_k", "key"),
    [
        ({"gate": "softmax_after"}, 1, "gate"),
        ({"renormalise": "before_drop"}, 1, "renormalise"),
        ({"renormalise": "after_drop"}, 1, "renormalise"),
        ({"second_expert": "threshold"}, 1, "second_expert"),
        ({"second_expert": "none", "renormalise": "after_drop"}, 2, "renormalise"),
        ({"second_expert": "none", "renormalise": "after_drop", "gate": "softmax_after"}, 4, "renormalise"),
    ],
)
def test_gates_that_are_always_one_are_refused(options: dict[str, Any], top_k, key):
    with pytest.raises(ConfigError) as error:
        TopK(**options).check_shape(RouterShape(4, 8, top_k))
    assert error.value.key == key
    assert "use" in error.value.why


@pytest.mark.parametrize("options", [{}, {"gate": "softmax_after"}, {"second_expert": "none"}])
def test_the_rest_is_accepted(options: dict[str, Any]):
    TopK(**options).check_shape(RouterShape(4, 8, 2))


@pytest.mark.parametrize("options", [{"jitter": 1.0}, {"second_threshold": 0.0}, {"init_scale": 0.0}, {"gate": "tanh"}])
def test_bounds(options: dict[str, Any]):
    with pytest.raises(ConfigError, match=next(iter(options))):
        TopK(**options)
