"""Expert prototyping: the best expert of each prototype, by hand, and what cannot be split."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.config import ConfigError
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers import RouterShape
from sparse_lm.moe.routers.prototype import Prototype, PrototypeRouter
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.moe.types import RouterInputs
from sparse_lm.sharding import DEFAULT

ODDS = np.array([1.0, 3.0, 2.0, 8.0, 5.0, 1.0])  # exp(logits)


def route(top_k: int, x_GSD=None, mask=None, key=None):
    """A router of 6 experts; without x, tokens whose logits are log(ODDS)."""
    router = Prototype().build(jax.random.key(0), RouterShape(6, 6, top_k), DEFAULT)
    assert isinstance(router, PrototypeRouter)
    if x_GSD is None:
        router.scores.weight_DE[...] = jnp.diag(jnp.log(jnp.asarray(ODDS, jnp.float32)))
        x_GSD = jnp.ones((1, 2, 6))
    mask = jnp.ones(x_GSD.shape[:2], bool) if mask is None else mask
    return router, *router(RouterInputs(x_GSD, mask, jnp.zeros(mask.shape, jnp.int32), 4), key)


@pytest.mark.parametrize(
    ("top_k", "experts", "gates"),
    [
        (1, [3], [8 / 20]),
        (2, [1, 3], [3 / 6, 8 / 14]),
        (3, [1, 3, 4], [3 / 4, 8 / 10, 5 / 6]),
    ],
)
def test_by_hand(top_k, experts, gates):
    _, decision, scores = route(top_k)
    np.testing.assert_array_equal(decision.expert_GSK[0], [experts] * 2)
    np.testing.assert_allclose(decision.gate_GSK[0, 0], gates, rtol=1e-5)
    of_prototype = ODDS.reshape(top_k, -1)
    shares = (of_prototype / of_prototype.sum(1, keepdims=True) / top_k).reshape(-1)
    np.testing.assert_allclose(scores.probability_GSE[0, 0], shares, rtol=1e-5)
    np.testing.assert_allclose(scores.logsumexp_GS, np.log(20), rtol=1e-5)
    assert scores.penalty_GS is None


def test_one_prototype_is_switch():
    x_GSD = jax.random.normal(jax.random.key(1), (2, 5, 6))
    router, decision, scores = route(1, x_GSD)
    switch = TopK().build(jax.random.key(0), RouterShape(6, 6, 1), DEFAULT)
    np.testing.assert_array_equal(switch.scores.weight_DE[...], router.scores.weight_DE[...])  # type: ignore
    expected, of_switch = switch(RouterInputs(x_GSD, jnp.ones((2, 5), bool), jnp.zeros((2, 5), jnp.int32), 4), None)
    np.testing.assert_array_equal(decision.expert_GSK, expected.expert_GSK)
    np.testing.assert_allclose(decision.gate_GSK, expected.gate_GSK, rtol=1e-6)
    np.testing.assert_allclose(scores.probability_GSE, of_switch.probability_GSE, rtol=1e-6)


def test_a_token_uses_one_expert_of_each_prototype_and_no_prototype_moves_another():
    x_GSD = jax.random.normal(jax.random.key(1), (3, 40, 6), jnp.bfloat16)
    router, decision, scores = route(3, x_GSD)
    np.testing.assert_array_equal(decision.expert_GSK // 2, np.broadcast_to(np.arange(3), (3, 40, 3)))
    assert np.all(np.asarray(decision.gate_GSK) > 0.5)  # the better of two
    np.testing.assert_allclose(scores.probability_GSE.sum(-1), 1, rtol=1e-6)
    router.scores.weight_DE[...] = router.scores.weight_DE[...].at[:, :2].multiply(-3.0)
    moved, _ = router(RouterInputs(x_GSD, jnp.ones((3, 40), bool), jnp.zeros((3, 40), jnp.int32), 4), None)
    np.testing.assert_array_equal(moved.expert_GSK[..., 1:], decision.expert_GSK[..., 1:])
    np.testing.assert_allclose(moved.gate_GSK[..., 1:], decision.gate_GSK[..., 1:], rtol=1e-6)
    np.testing.assert_array_equal(moved.expert_GSK[..., 0], 1 - decision.expert_GSK[..., 0])


def test_padding_gets_no_expert_and_training_is_not_random():
    x_GSD, mask = jax.random.normal(jax.random.key(1), (1, 3, 6)), jnp.asarray([[True, False, True]])
    _, decision, _ = route(2, x_GSD, mask)
    np.testing.assert_array_equal(decision.expert_GSK[0, 1], [-1, -1])
    np.testing.assert_array_equal(decision.gate_GSK[0, 1], 0)
    assert np.all(np.asarray(decision.expert_GSK)[0, [0, 2]] >= 0)
    _, training, _ = route(2, x_GSD, mask, jax.random.key(5))
    np.testing.assert_array_equal(training.expert_GSK, decision.expert_GSK)


@pytest.mark.parametrize(("num_experts", "top_k", "words"), [(8, 3, "multiple of top_k"), (4, 4, "more experts")])
def test_refusals(num_experts, top_k, words):
    with pytest.raises(ConfigError, match=rf"router\.kind='prototype'.*{words}"):
        MoEConfig(num_experts=num_experts, top_k=top_k, router=Prototype())
