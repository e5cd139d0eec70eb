"""Noisy top-k gating against the paper's equations in float64, token by token, and its limits by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.config import ConfigError
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers import RouterShape
from sparse_lm.moe.routers.noisy_top_k import NoisyTopK, NoisyTopKRouter
from sparse_lm.moe.types import RouterInputs, Scores
from sparse_lm.sharding import DEFAULT

WIDTH, EXPERTS = 6, 4


def build(config: NoisyTopK, top_k: int = 2) -> NoisyTopKRouter:
    router = config.build(jax.random.key(0), RouterShape(WIDTH, EXPERTS, top_k), DEFAULT)
    assert isinstance(router, NoisyTopKRouter)
    return router


def inputs(x_GSD, mask=None) -> RouterInputs:
    mask = jnp.ones(x_GSD.shape[:2], bool) if mask is None else jnp.asarray(mask)
    return RouterInputs(x_GSD, mask, jnp.zeros(mask.shape, jnp.int32), 4)


def own_loss(scores: Scores) -> jax.Array:
    """The router's own loss per token, which it has."""
    assert scores.penalty_GS is not None
    return scores.penalty_GS


def paper(x_SD, clean_DE, noise_DE, normal_SE, config: NoisyTopK, top_k: int, chosen_SK):
    """Equations 3 to 9 and the two losses of one group: (gates as a dense table, loss). jax in float64."""
    gates, chances = [], []
    for x_D, normal_E, best in zip(x_SD, normal_SE, chosen_SK, strict=True):
        clean = x_D @ clean_DE
        std = jnp.log1p(jnp.exp(x_D @ noise_DE)) + config.noise_floor
        noisy = clean + normal_E * std
        powers = jnp.where(np.isin(np.arange(EXPERTS), best), jnp.exp(noisy), 0.0)
        gates.append(powers / powers.sum())
        chance = []
        for e in range(EXPERTS):
            others = sorted((o for o in range(EXPERTS) if o != e), key=lambda o: -float(noisy_of(noisy, o)))
            threshold = noisy[others[top_k - 1]]
            chance.append(0.5 * (1 + jax.lax.erf((clean[e] - threshold) / std[e] / 2**0.5)))
        chances.append(jnp.stack(chance))
    importance, load = jnp.stack(gates).sum(0), jnp.stack(chances).sum(0)
    loss = config.importance * importance.var() / importance.mean() ** 2
    return jnp.stack(gates), loss + config.load * load.var() / load.mean() ** 2


def noisy_of(noisy_E, expert: int):
    return jax.lax.stop_gradient(noisy_E)[expert]


@pytest.mark.parametrize("top_k", [2, 3])
def test_training_equals_the_paper_with_its_gradients(top_k):
    config = NoisyTopK(importance=0.7, load=0.4, init_scale=2.0)
    router, key = build(config, top_k), jax.random.key(3)
    x_SD = np.asarray(jax.random.normal(jax.random.key(1), (7, WIDTH)))
    target_SE = np.random.default_rng(0).normal(size=(7, EXPERTS))
    normal_SE = np.asarray(jax.random.normal(key, (1, 7, EXPERTS))[0], np.float64)

    def ours(router, x_SD):
        decision, scores = router(inputs(x_SD[None]), key)
        dense = jax.nn.one_hot(decision.expert_GSK, EXPERTS) * decision.gate_GSK[..., None]
        return jnp.sum(dense[0].sum(1) * target_SE) + own_loss(scores)[0, 0], decision

    (value, decision), (d_router, d_x) = jax.value_and_grad(ours, (0, 1), has_aux=True)(router, jnp.asarray(x_SD))
    weights, d_weights = ((r.scores.weight_DE[...], r.noise_DE[...]) for r in (router, d_router))
    chosen = np.asarray(decision.expert_GSK[0])
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(weight, np.float64)) for weight in weights]

        def theirs(clean_DE, noise_DE, x_SD):
            gates, loss = paper(x_SD, clean_DE, noise_DE, normal_SE, config, top_k, chosen)
            return jnp.sum(gates * target_SE) + loss

        arguments = (*exact, jnp.asarray(x_SD, jnp.float64))
        expected, gradients = jax.value_and_grad(theirs, (0, 1, 2))(*arguments)
        noisy = x_SD @ exact[0] + normal_SE * (np.log1p(np.exp(x_SD @ exact[1])) + config.noise_floor)
        np.testing.assert_array_equal(chosen, np.argsort(-noisy, axis=1)[:, :top_k])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, want in zip((*d_weights, d_x), gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert np.abs(d_weights[1]).max() > 1e-3  # the noise is learned


def test_evaluation_has_no_noise_and_counts_its_load():
    router = build(NoisyTopK(importance=0.0, load=1.0))
    router.scores.weight_DE[...] = jnp.eye(WIDTH, EXPERTS)
    x_GSD = jnp.asarray([[[3.0, 2, 1, 0, 0, 0], [3.0, 1, 2, 0, 0, 0]]])
    decision, scores = router(inputs(x_GSD), None)
    np.testing.assert_array_equal(decision.expert_GSK[0], [[0, 1], [0, 2]])
    gate = np.exp(3) / (np.exp(3) + np.exp(2))  # the other experts are left out before the softmax
    np.testing.assert_allclose(decision.gate_GSK[0], [[gate, 1 - gate]] * 2, rtol=1e-6)
    np.testing.assert_allclose(own_loss(scores), 0.5)  # loads 2 1 1 0: variance 1/2, mean 1
    odds = np.exp([3, 2, 1, 0])
    np.testing.assert_allclose(scores.probability_GSE[0, 0], odds / odds.sum(), rtol=1e-6)
    np.testing.assert_allclose(scores.logsumexp_GS[0, 0], np.log(odds.sum()), rtol=1e-6)


def test_a_fresh_router_chooses_all_experts_alike():
    """Weights start at 0, and the noise's standard deviation at ln 2 + 0.01."""
    router = build(NoisyTopK())
    assert not np.any(router.scores.weight_DE[...])
    assert not np.any(router.noise_DE[...])
    decision, scores = router(inputs(jax.random.normal(jax.random.key(1), (4, 500, WIDTH))), jax.random.key(2))
    load = np.bincount(np.asarray(decision.expert_GSK).reshape(-1), minlength=EXPERTS)
    np.testing.assert_allclose(load, 1000, atol=4 * 500**0.5)
    noise = np.log(np.asarray(scores.probability_GSE)) + np.asarray(scores.logsumexp_GS)[..., None]
    np.testing.assert_allclose(noise.std(), np.log(2) + 0.01, rtol=0.03)
    assert np.all(np.asarray(own_loss(scores)) < 0.1 * 0.05)


def test_the_losses_pull_an_overloaded_expert_down():
    router = build(NoisyTopK())
    router.scores.weight_DE[...] = router.scores.weight_DE[...].at[0, 0].set(1.0)
    x_GSD = jax.random.normal(jax.random.key(1), (1, 300, WIDTH)).at[..., 0].set(1.0)

    def penalty(router):
        scores = router(inputs(x_GSD), jax.random.key(2))[1]
        return jnp.mean(own_loss(scores))

    value, d_router = jax.value_and_grad(penalty)(router)
    gradient = d_router.scores.weight_DE[...]
    assert value > 0.02
    assert gradient[0, 0] > 0.02
    assert gradient[0, 0] > 2 * np.abs(gradient[0, 1:]).max()


def test_padding_gets_no_expert_and_counts_in_no_loss():
    router, key = build(NoisyTopK(init_scale=4.0)), jax.random.key(2)
    x_GSD = jax.random.normal(jax.random.key(1), (2, 5, WIDTH), jnp.bfloat16)
    mask = np.array([[True] * 5, [True, False, True, False, False]])
    decision, scores = router(inputs(x_GSD, mask), key)
    assert np.all((np.asarray(decision.expert_GSK) >= 0) == mask[..., None])
    assert np.all(np.asarray(decision.gate_GSK)[~mask] == 0)
    np.testing.assert_allclose(np.asarray(decision.gate_GSK)[mask].sum(-1), 1, rtol=1e-6)
    other, changed = router(inputs(jnp.where(mask[..., None], x_GSD, 9), mask), key)
    np.testing.assert_array_equal(other.expert_GSK, decision.expert_GSK)
    np.testing.assert_array_equal(own_loss(changed), own_loss(scores))


def test_top_1_is_refused_and_the_defaults_are_the_papers():
    with pytest.raises(ConfigError, match=r"router\.kind='noisy_top_k'.*the router learns nothing; use top_k=2"):
        MoEConfig(top_k=1, router=NoisyTopK())
    config = NoisyTopK()
    assert (config.importance, config.load, config.init_scale) == (0.1, 0.1, 0.0)
    assert MoEConfig(top_k=4, router=config).causal
    with pytest.raises(ConfigError, match="noise_floor"):
        NoisyTopK(noise_floor=0.0)
