"""V-MoE's router: noise of a fixed size, gates that are not renormalised, and its two losses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.config import ConfigError
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers import RouterShape
from sparse_lm.moe.routers.fixed_noise import FixedNoise, FixedNoiseRouter
from sparse_lm.moe.types import RouterInputs, Scores
from sparse_lm.sharding import DEFAULT

WIDTH, EXPERTS = 3, 3

# V-MoE's own test of its load loss: k = 2, noise of standard deviation 0.1, the load loss 0.485738645.
LOGITS_SE = np.array([[0.9, 0.06, 0.04], [0.7, 0.18, 0.12], [0.85, 0.05, 0.1]], np.float32)
NOISE_SE = np.array([[-0.037, 0.026, -0.018], [-0.074, 0.045, -0.015], [-0.067, -0.059, 0.073]], np.float32)


def route(config: FixedNoise, key=None, top_k: int = 2, x_GSD=None, mask=None):
    """The router with the logits of its input."""
    router = config.build(jax.random.key(0), RouterShape(WIDTH, EXPERTS, top_k), DEFAULT)
    assert isinstance(router, FixedNoiseRouter)
    router.scores.weight_DE[...] = jnp.eye(3)
    x_GSD = jnp.asarray(LOGITS_SE[None]) if x_GSD is None else x_GSD
    mask = jnp.ones(x_GSD.shape[:2], bool) if mask is None else mask
    return router(RouterInputs(x_GSD, mask, jnp.zeros(mask.shape, jnp.int32), 4), key)


def own_loss(scores: Scores) -> jax.Array:
    """The router's own loss per token, which it has."""
    assert scores.penalty_GS is not None
    return scores.penalty_GS


def test_training_gives_the_numbers_of_vmoe(monkeypatch):
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.asarray(NOISE_SE / 0.1).reshape(shape))
    decision, scores = route(FixedNoise(noise=0.3, importance=0.0, load=1.0), jax.random.key(0))
    np.testing.assert_allclose(own_loss(scores), 0.485738645, rtol=1e-5)
    noisy = np.exp(LOGITS_SE + NOISE_SE)
    probability = noisy / noisy.sum(-1, keepdims=True)
    np.testing.assert_allclose(scores.probability_GSE[0], probability, rtol=1e-5)
    np.testing.assert_array_equal(decision.expert_GSK[0], np.argsort(-noisy, axis=-1)[:, :2])
    np.testing.assert_allclose(decision.gate_GSK[0], -np.sort(-probability, axis=-1)[:, :2], rtol=1e-5)
    _, scores = route(FixedNoise(noise=0.3, importance=1.0, load=0.0), jax.random.key(0))
    clean = np.exp(LOGITS_SE) / np.exp(LOGITS_SE).sum(-1, keepdims=True)  # importance does not see the noise
    np.testing.assert_allclose(own_loss(scores), (clean.sum(0).std() / clean.sum(0).mean()) ** 2, rtol=1e-4)


def test_evaluation_has_no_noise_and_counts_its_load():
    decision, scores = route(FixedNoise(importance=0.0, load=1.0))
    np.testing.assert_array_equal(decision.expert_GSK[0], [[0, 1], [0, 1], [0, 2]])
    odds = np.exp(LOGITS_SE)
    np.testing.assert_allclose(scores.probability_GSE[0], odds / odds.sum(-1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(scores.logsumexp_GS[0], np.log(odds.sum(-1)), rtol=1e-6)
    np.testing.assert_allclose(own_loss(scores), 1 / 6, rtol=1e-6)  # loads 3 2 1: variance 2/3, mean 2
    quiet, _ = route(FixedNoise(noise=0.0), jax.random.key(1))
    np.testing.assert_array_equal(quiet.gate_GSK, decision.gate_GSK)


@pytest.mark.parametrize("noise", [1.0, 2.5])
def test_the_noise_has_the_size_that_it_says(noise):
    x_GSD = jnp.zeros((10, 800, 3))
    _, scores = route(FixedNoise(noise=noise), jax.random.key(1), x_GSD=x_GSD)
    drawn = np.log(np.asarray(scores.probability_GSE)) + np.asarray(scores.logsumexp_GS)[..., None]
    np.testing.assert_allclose(drawn.std(), noise / 3, rtol=0.02)
    np.testing.assert_allclose(drawn.mean(), 0, atol=0.02 * noise)


def test_keys_repeat_and_differ():
    x_GSD = jax.random.normal(jax.random.key(9), (2, 50, 3))
    draws = [route(FixedNoise(), jax.random.key(seed), x_GSD=x_GSD)[0].expert_GSK for seed in (1, 1, 2)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


def test_gates_are_not_renormalised_so_that_top_1_learns():
    def gate(x_GSD):
        return route(FixedNoise(), jax.random.key(1), 1, x_GSD)[0].gate_GSK.sum()

    assert np.abs(jax.grad(gate)(jnp.asarray(LOGITS_SE[None]))).max() > 0.1
    decision, _ = route(FixedNoise(), top_k=3)
    np.testing.assert_allclose(decision.gate_GSK.sum(-1), 1, rtol=1e-6)


def test_the_load_loss_has_a_gradient_in_training_alone():
    def penalty(x_GSD, key):
        return jnp.mean(own_loss(route(FixedNoise(importance=0.0), key, x_GSD=x_GSD)[1]))

    x_GSD = jnp.asarray(LOGITS_SE[None])
    gradient = np.asarray(jax.grad(penalty)(x_GSD, jax.random.key(1)))
    assert gradient[..., 0].sum() > 0.001  # descent lowers the overloaded expert
    np.testing.assert_array_equal(jax.grad(lambda x: penalty(x, None))(x_GSD), 0)


def test_padding_gets_no_expert():
    mask = jnp.asarray([[True, False, True]])
    decision, scores = route(FixedNoise(), jax.random.key(1), mask=mask)
    np.testing.assert_array_equal(decision.expert_GSK[0, 1], [-1, -1])
    np.testing.assert_array_equal(decision.gate_GSK[0, 1], 0)
    changed = jnp.asarray(LOGITS_SE[None]).at[0, 1].set(7.0)
    _, other = route(FixedNoise(), jax.random.key(1), mask=mask, x_GSD=changed)
    np.testing.assert_array_equal(own_loss(other), own_loss(scores))


def test_defaults_are_the_papers_and_causal():
    config = FixedNoise()
    assert (config.noise, config.importance, config.load) == (1.0, 0.005, 0.005)
    assert MoEConfig(top_k=1, router=config).causal
    with pytest.raises(ConfigError, match="noise"):
        FixedNoise(noise=-1.0)
