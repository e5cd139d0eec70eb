"""What all routers share: a float32 linear map, jitter on its input in training only, and the contract of a config."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.moe.routers import ROUTERS, Router, RouterConfig, RouterShape
from sparse_lm.moe.routers.base import LinearScores
from sparse_lm.moe.types import RouterInputs, Soft
from sparse_lm.sharding import DEFAULT

SHAPE = RouterShape(6, 4, 2)


@pytest.fixture
def scores() -> LinearScores:
    return LinearScores(jax.random.key(0), SHAPE, 1.0, DEFAULT)


def test_logits_are_float32_products_whatever_the_input(scores):
    x_GSD = jax.random.normal(jax.random.key(1), (2, 3, 6), jnp.bfloat16)
    logits = scores(x_GSD, 0.0, None)
    assert logits.dtype == jnp.float32
    exact = np.asarray(x_GSD, np.float64) @ np.asarray(scores.weight_DE[...], np.float64)
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-6)


def test_jitter_multiplies_the_input_by_at_most_its_size(scores):
    scores.weight_DE[...] = jnp.eye(6, 4)  # logits show the jittered input itself
    x_GSD = jnp.full((50, 40, 6), 2.0)
    logits = np.asarray(scores(x_GSD, 0.1, jax.random.key(2)))
    assert logits.min() >= 1.8
    assert logits.max() <= 2.2
    np.testing.assert_allclose(logits.mean(), 2.0, atol=0.01)
    np.testing.assert_allclose(logits.std(), 0.4 / 12**0.5, rtol=0.05)  # uniform, each value of its own
    assert np.all(np.asarray(scores(0 * x_GSD, 0.1, jax.random.key(2))) == 0)


def test_no_jitter_in_evaluation_or_at_zero(scores):
    x_GSD = jax.random.normal(jax.random.key(1), (2, 3, 6))
    plain = scores(x_GSD, 0.0, None)
    np.testing.assert_array_equal(scores(x_GSD, 0.5, None), plain)
    np.testing.assert_array_equal(scores(x_GSD, 0.0, jax.random.key(2)), plain)
    assert not np.allclose(scores(x_GSD, 0.5, jax.random.key(2)), plain)


@pytest.mark.parametrize("scale", [0.1, 4.0])
def test_initial_weights(scale):
    scores = LinearScores(jax.random.key(0), RouterShape(64, 128, 1), scale, DEFAULT)
    np.testing.assert_allclose(np.std(scores.weight_DE[...]), (scale / 64) ** 0.5, rtol=0.03)


@pytest.mark.parametrize("kind", ROUTERS)
def test_every_router_of_the_table_follows_the_contract(kind):
    config = ROUTERS[kind]()
    assert config.kind == kind
    assert isinstance(config, RouterConfig)
    # A BASE layer has one expert per token, and slots of Soft MoE have weights.
    shape = {"base": RouterShape(6, 4, 1), "soft": RouterShape(6, 4, 2, 3)}.get(kind, SHAPE)
    config.check_shape(shape)
    router = config.build(jax.random.key(0), shape, DEFAULT)
    assert isinstance(router, Router)
    mask = jnp.asarray([[True, True, False]] * 2)
    x_GSD = jax.random.normal(jax.random.key(1), (2, 3, 6), jnp.bfloat16)
    inputs = RouterInputs(x_GSD, mask, jnp.zeros((2, 3), jnp.int32), slots=3)
    decision, scores = router(inputs, jax.random.key(2))
    decision = decision.choices(mask) if isinstance(decision, Soft) else decision
    assert decision.expert_GSK.shape == decision.gate_GSK.shape
    assert decision.expert_GSK.shape[:2] == (2, 3)
    assert decision.gate_GSK.dtype == scores.probability_GSE.dtype == scores.logsumexp_GS.dtype == jnp.float32
    assert np.all(np.asarray(decision.expert_GSK)[:, 2] == -1)
    assert np.all(np.asarray(decision.gate_GSK)[np.asarray(decision.expert_GSK) < 0] == 0)
    np.testing.assert_allclose(scores.probability_GSE.sum(-1), 1, rtol=1e-6)


def test_the_base_cannot_be_used_by_itself():
    with pytest.raises(TypeError, match="abstract"):
        RouterConfig()  # type: ignore[abstract]
    with pytest.raises(TypeError, match="abstract"):
        Router()  # type: ignore[abstract]
