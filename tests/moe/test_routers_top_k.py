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


def test_drawn_experts_are_as_frequent_as_the_softmax_says():
    expert_SK, gate_SK, scores = route(TopK(sample=True), 1, TOKENS, jax.random.key(1))
    share_E = np.bincount(expert_SK[:, 0], minlength=4) / TOKENS
    np.testing.assert_allclose(share_E, PROBABILITY, atol=4 * (0.25 / TOKENS) ** 0.5)
    # The gate is the probability of the expert that was drawn, and the statistics see no draw.
    np.testing.assert_allclose(gate_SK[:, 0], PROBABILITY[expert_SK[:, 0]], rtol=1e-5)
    np.testing.assert_allclose(scores.probability_GSE[0], np.tile(PROBABILITY, (TOKENS, 1)), rtol=1e-5)


def test_drawn_experts_are_distinct_and_in_the_order_of_the_draw():
    """p(i, then j) = p_i p_j / (1 - p_i): one after another, without replacement."""
    expert_SK, _, _ = route(TopK(sample=True), 2, TOKENS, jax.random.key(2))
    share_EE = np.zeros((4, 4))
    np.add.at(share_EE, (expert_SK[:, 0], expert_SK[:, 1]), 1 / TOKENS)
    expected_EE = PROBABILITY[:, None] * PROBABILITY[None, :] / (1 - PROBABILITY[:, None])
    np.fill_diagonal(expected_EE, 0)
    assert np.sum(expected_EE) == pytest.approx(1)
    np.testing.assert_allclose(share_EE, expected_EE, atol=4 * (0.25 / TOKENS) ** 0.5)
    all_four, gate_SK, _ = route(TopK(sample=True, renormalise="before_drop"), 4, 50, jax.random.key(2))
    np.testing.assert_array_equal(np.sort(all_four), np.tile(np.arange(4), (50, 1)))
    np.testing.assert_allclose(gate_SK, PROBABILITY[all_four], rtol=1e-5)


@pytest.mark.parametrize("options", [{"sample": True}, {"input_dropout": 0.5}, {"jitter": 0.5}])
def test_exploration_is_the_key_s_and_absent_in_evaluation(options: dict[str, Any]):
    draws = [route(TopK(**options), 2, 100, jax.random.key(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(draws[0][0], draws[1][0])
    np.testing.assert_array_equal(draws[0][1], draws[1][1])
    assert not np.array_equal(draws[0][1], draws[2][1])
    quiet = route(TopK(**options), 2, 100)
    np.testing.assert_array_equal(quiet[0], np.tile([1, 3], (100, 1)))
    np.testing.assert_allclose(quiet[1], np.tile([0.5, 0.35], (100, 1)), rtol=1e-5)


def test_input_dropout_is_of_the_router_s_input():
    """The diagonal weights make a logit of each value of the input: 0 where it is dropped, twice as large elsewhere."""
    _, _, scores = route(TopK(input_dropout=0.5), 1, TOKENS, jax.random.key(3))
    powers = np.exp(2 * (np.log(PROBABILITY) + 1.0))
    states = np.array([[bit >> e & 1 for e in range(4)] for bit in range(16)])
    expected = np.sort(np.log(np.where(states, powers, 1.0).sum(1)))
    got, counts = np.unique(np.round(np.asarray(scores.logsumexp_GS[0]), 4), return_counts=True)
    np.testing.assert_allclose(got, expected, atol=1e-3)
    np.testing.assert_allclose(counts / TOKENS, 1 / 16, atol=4 * (1 / 16 / TOKENS) ** 0.5)


def test_the_gradient_of_a_draw_is_that_of_the_gate():
    config = TopK(sample=True)
    router = config.build(jax.random.key(0), RouterShape(4, 4, 1), DEFAULT)
    assert isinstance(router, TopKRouter)
    x_GSD = jax.random.normal(jax.random.key(1), (1, 8, 4))
    rows = (jnp.ones((1, 8), bool), jnp.zeros((1, 8), jnp.int32), 8)
    key = jax.random.key(2)
    drawn_GS1 = jax.jit(router)(RouterInputs(x_GSD, *rows), key)[0].expert_GSK
    got = jax.jit(jax.grad(lambda x: router(RouterInputs(x, *rows), key)[0].gate_GSK.sum()))(x_GSD)

    def by_hand(x_GSD):
        return jnp.take_along_axis(jax.nn.softmax(x_GSD @ router.scores.weight_DE[...], -1), drawn_GS1, -1).sum()

    np.testing.assert_allclose(got, jax.grad(by_hand)(x_GSD), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("gate", ["softmax_before", "softmax_after"])
def test_bfloat16_rounds_everything_up_to_the_statistics(gate):
    probability = np.array([0.13, 0.65, 0.065, 0.455])  # the logsumexp is log 1.3 + 1
    plain, rounded = (route(TopK(gate=gate, dtype=d), 2, probability=probability) for d in ("float32", "bfloat16"))
    np.testing.assert_array_equal(plain[0], rounded[0])
    for one, other in (
        (plain[1], rounded[1]),
        *zip(jax.tree.leaves(plain[2]), jax.tree.leaves(rounded[2]), strict=True),
    ):
        one, other = np.asarray(one), np.asarray(other)
        assert other.dtype == np.float32  # as what is summed over tokens has to be
        np.testing.assert_array_equal(other, other.astype(jnp.bfloat16).astype(np.float32))
        assert not np.array_equal(one, other)
        np.testing.assert_allclose(one, other, rtol=0.03)


def test_bfloat16_cannot_tell_close_experts_apart():
    """Selective precision is there for this: logits that differ by less than 2^-8 of themselves become equal."""
    probability = np.exp(np.array([1.0, 4.0, 1.0, 4.002]) - 1.0)
    assert route(TopK(), 1, probability=probability)[0][0, 0] == 3
    assert route(TopK(dtype="bfloat16"), 1, probability=probability)[0][0, 0] == 1


def test_parameters_and_their_gradients_stay_float32():
    router = TopK(dtype="bfloat16", bias=True, pathway=True, jitter=0.1).build(
        jax.random.key(0), RouterShape(4, 4, 2), DEFAULT
    )
    x_GSD = jnp.ones((1, 2, 4), jnp.bfloat16)
    rows = (jnp.ones((1, 2), bool), jnp.zeros((1, 2), jnp.int32), 2, None, jnp.ones((1, 2, 4)))

    def total(router):
        decision, scores = router(RouterInputs(x_GSD, *rows), jax.random.key(1))
        assert scores.carried_GSE.dtype == jnp.float32
        return decision.gate_GSK.sum() + scores.logsumexp_GS.sum()

    gradients = jax.tree.leaves(jax.jit(jax.grad(total))(router))
    assert len(gradients) == 3 and {leaf.dtype for leaf in gradients} == {jnp.dtype("float32")}
    assert all(np.abs(leaf).max() > 0 for leaf in gradients)


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


@pytest.mark.parametrize(
    "options",
    [
        {"jitter": 1.0},
        {"input_dropout": 1.0},
        {"dtype": "float16"},
        {"second_threshold": 0.0},
        {"init_scale": 0.0},
        {"gate": "tanh"},
    ],
)
def test_bounds(options: dict[str, Any]):
    with pytest.raises(ConfigError, match=next(iter(options))):
        TopK(**options)
