"""ReLU routing: choices, penalty and its coefficient by hand; the sparsity that it reaches; what is refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.config import ConfigError
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers import RouterShape
from sparse_lm.moe.routers.relu import LARGEST, SMALLEST, Relu, ReluRouter
from sparse_lm.moe.types import RouterInputs, RouterStats
from sparse_lm.sharding import DEFAULT

# Two groups of three tokens with four experts, as logits; the last token of the second group is padding.
LOGITS = (
    ((1.0, -1.0, 2.0, 0.0), (0.5, 0.25, 0.75, -2.0), (-1.0, -1.0, -1.0, -1.0)),
    ((3.0, 1.0, -1.0, -1.0), (1.0, -1.0, -1.0, -1.0), (5.0, 5.0, 5.0, 5.0)),
)
MASK = ((True, True, True), (True, True, False))


def build(config: Relu, top_k: int = 1, num_experts: int = 4) -> ReluRouter:
    router = config.build(jax.random.key(0), RouterShape(num_experts, num_experts, top_k), DEFAULT)
    assert isinstance(router, ReluRouter)
    router.scores.weight_DE[...] = jnp.eye(num_experts)
    return router


def route(config: Relu, top_k: int = 1, key=None):
    inputs = RouterInputs(jnp.asarray(LOGITS), jnp.asarray(MASK), jnp.zeros((2, 3), jnp.int32), 3)
    run = jax.jit(lambda router, inputs, key: router(inputs, key))
    return run(build(config, top_k), inputs, key)


def test_every_positive_logit_is_used_highest_first():
    decision, _ = route(Relu())
    none = [-1, -1, -1, -1]
    np.testing.assert_array_equal(
        decision.expert_GSK, [[[2, 0, -1, -1], [2, 0, 1, -1], none], [[0, 1, -1, -1], [0, -1, -1, -1], none]]
    )
    np.testing.assert_array_equal(
        decision.gate_GSK, [[[2, 1, 0, 0], [0.75, 0.5, 0.25, 0], [0] * 4], [[3, 1, 0, 0], [1, 0, 0, 0], [0] * 4]]
    )


def test_at_most_max_active_are_used():
    decision, _ = route(Relu(max_active=2))
    np.testing.assert_array_equal(decision.expert_GSK, [[[2, 0], [2, 0], [-1, -1]], [[0, 1], [0, -1], [-1, -1]]])
    np.testing.assert_array_equal(decision.gate_GSK, [[[2, 1], [0.75, 0.5], [0, 0]], [[3, 1], [1, 0], [0, 0]]])


def test_statistics_are_of_a_softmax_over_the_logits():
    _, scores = route(Relu())
    powers = np.exp(np.array(LOGITS))
    np.testing.assert_allclose(scores.probability_GSE, powers / powers.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(scores.logsumexp_GS, np.log(powers.sum(-1)), rtol=1e-5)


def test_the_plain_penalty_is_the_sum_of_the_gates():
    _, scores = route(Relu(coefficient=0.5, refine_balance=False))
    np.testing.assert_allclose(np.asarray(scores.penalty_GS)[np.array(MASK)], [1.5, 0.75, 0, 2, 0.5], rtol=1e-6)


@pytest.mark.parametrize("max_active", [None, 2])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_refined_penalty_by_hand(top_k, max_active):
    """Positive gates of the first group's three tokens: 2, 1, 2, 0; of the second one's two real ones: 2, 1, 0, 0."""
    _, scores = route(Relu(coefficient=0.5, max_active=max_active if top_k == 1 else None), top_k)
    first = np.array([2, 1, 2, 0]) * 4 / (3 * top_k)
    second = np.array([2, 1, 0, 0]) * 4 / (2 * top_k)
    expected = [
        0.5 * (1 * first[0] + 2 * first[2]),
        0.5 * (0.5 * first[0] + 0.25 * first[1] + 0.75 * first[2]),
        0.0,
        0.5 * (3 * second[0] + 1 * second[1]),
        0.5 * 1 * second[0],
    ]
    np.testing.assert_allclose(np.asarray(scores.penalty_GS)[np.array(MASK)], expected, rtol=1e-5)


def test_the_refinement_is_1_at_balance_and_at_the_target():
    """Each token uses one expert of its own: f is 1 for every expert."""
    inputs = RouterInputs(jnp.eye(4)[None] * 3 - 1, jnp.ones((1, 4), bool), jnp.zeros((1, 4), jnp.int32), 4)
    for refine in (True, False):
        _, scores = build(Relu(coefficient=0.5, refine_balance=refine))(inputs, None)
        np.testing.assert_allclose(np.asarray(scores.penalty_GS), 1.0, rtol=1e-6)  # 0.5 * a gate of 2


def test_gradients_of_gates_and_penalty():
    """Gates: 1 where positive. Penalty: coefficient * f there, since nothing flows through f or the coefficient."""
    router = build(Relu(coefficient=0.5))

    def total(part):
        def function(router, x_GSD):
            inputs = RouterInputs(x_GSD, jnp.asarray(MASK), jnp.zeros((2, 3), jnp.int32), 3)
            decision, scores = router(inputs, None)
            return decision.gate_GSK.sum() if part == "gates" else (scores.penalty_GS * inputs.mask_GS).sum()

        return jax.grad(function, (0, 1))(router, jnp.asarray(LOGITS))

    positive = (np.array(LOGITS) > 0) & np.array(MASK)[..., None]
    d_router, d_x = total("gates")
    np.testing.assert_array_equal(d_x, positive)
    assert float(d_router.coefficient[...]) == 0
    d_router, d_x = total("penalty")
    weight = np.stack([np.array([2, 1, 2, 0]) * 4 / 3, np.array([2, 1, 0, 0]) * 2])
    np.testing.assert_allclose(d_x, 0.5 * weight[:, None] * positive, rtol=1e-5)
    assert float(d_router.coefficient[...]) == 0


def test_training_is_as_quiet_as_evaluation():
    evaluation, training = (jax.tree.leaves(route(Relu(), key=key)) for key in (None, jax.random.key(1)))
    for one, two in zip(evaluation, training, strict=True):
        np.testing.assert_array_equal(one, two)


# The coefficient


def stats_of(tokens: int, used) -> RouterStats:
    """The statistics of a batch, in one unit. used: assignments per expert."""
    zero, none = jnp.zeros((1,), jnp.int32), jnp.zeros((1,), jnp.float32)
    load_UE = jnp.asarray([used], jnp.int32)
    importance_UE = jnp.zeros(load_UE.shape, jnp.float32)
    return RouterStats(jnp.full((1,), tokens, jnp.int32), zero, zero, load_UE, importance_UE, none, none, none)


@pytest.mark.parametrize(
    ("tokens", "used", "factor"),
    [
        (10, [10, 5, 3, 3], 1.2),  # 21 of 40 gates are positive, the target is 20
        (10, [10, 5, 3, 2], 1.0),
        (10, [10, 5, 3, 1], 1 / 1.2),
        (10, [0, 0, 0, 0], 1 / 1.2),
        (0, [0, 0, 0, 0], 1.0),
    ],
)
def test_coefficient_by_hand(tokens, used, factor):
    router = build(Relu(), top_k=2)
    new = router.updated(stats_of(tokens, used))
    assert new.coefficient[...].dtype == jnp.float32
    np.testing.assert_allclose(new.coefficient[...], 1e-8 * factor, rtol=1e-6)
    np.testing.assert_allclose(router.coefficient[...], 1e-8, rtol=1e-6)  # the old router stays as it was
    np.testing.assert_allclose(new.updated(stats_of(tokens, used)).coefficient[...], 1e-8 * factor**2, rtol=1e-6)


@pytest.mark.parametrize(("start", "used"), [(SMALLEST, 0), (LARGEST, 40)])
def test_the_coefficient_stays_in_range_and_comes_back(start, used):
    router = build(Relu(coefficient=start, growth=2.0), top_k=2)
    for _ in range(3):
        router = router.updated(stats_of(10, [used, 0, 0, 0]))
    np.testing.assert_allclose(router.coefficient[...], start, rtol=1e-6)
    router = router.updated(stats_of(10, [40 - used, 0, 0, 0]))
    np.testing.assert_allclose(router.coefficient[...], start * (2.0 if used == 0 else 0.5), rtol=1e-6)


def test_the_penalty_reaches_the_target_and_balance():
    """Plain gradient descent on the penalty and a loss that wants the logits back: the share of zeros settles at 3/4.

    The bias of the tokens towards experts 0 and 1 is what the refinement has to work against.
    """
    shape = (4, 32, 8)
    wanted = jax.random.normal(jax.random.key(0), shape) + jnp.asarray([1.0, 1.0, 0, 0, 0, 0, 0, 0])
    mask, ids = jnp.ones(shape[:2], bool), jnp.zeros(shape[:2], jnp.int32)

    def loss(logits, router):
        decision, scores = router(RouterInputs(logits, mask, ids, 32), None)
        return jnp.sum(jnp.square(logits - wanted)) / 2 + jnp.sum(scores.penalty_GS), decision

    @jax.jit
    def step(carry, _):
        logits, router = carry
        gradient, decision = jax.grad(loss, has_aux=True)(logits, router)
        used = jnp.sum(decision.expert_GSK[..., None] == jnp.arange(8), axis=(0, 1, 2))
        return (logits - 0.05 * gradient, router.updated(stats_of(128, used))), used

    start = (wanted, build(Relu(coefficient=1e-3, growth=1.02), top_k=2, num_experts=8))
    used = np.asarray(jax.lax.scan(step, start, jnp.arange(900))[1])
    share = used.sum(1) / (128 * 8)
    assert share[0] > 0.5
    np.testing.assert_allclose(share[-100:].mean(), 2 / 8, atol=0.03)
    assert used[0, :2].mean() / used[0].mean() > 1.4


# What is refused


@pytest.mark.parametrize(("max_active", "top_k"), [(2, 2), (1, 2), (9, 2)])
def test_limits_that_cannot_work(max_active, top_k):
    with pytest.raises(ConfigError, match=r"router\.max_active.*None"):
        MoEConfig(num_experts=8, top_k=top_k, router=Relu(max_active=max_active))


@pytest.mark.parametrize(("max_active", "top_k"), [(None, 1), (3, 2), (8, 8), (8, 2)])
def test_the_rest_is_accepted(max_active, top_k):
    assert MoEConfig(num_experts=8, top_k=top_k, router=Relu(max_active=max_active)).causal


@pytest.mark.parametrize(
    "options", [{"growth": 1.0}, {"coefficient": 0.0}, {"coefficient": 1e-31}, {"coefficient": 1e31}, {"max_active": 0}]
)
def test_bounds(options: dict[str, Any]):
    with pytest.raises(ConfigError) as error:
        Relu(**options)
    assert error.value.key == next(iter(options))
