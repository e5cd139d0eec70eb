"""SparseMixer: candidates and gates by hand, the law of the draws, and what its gradient estimates."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.config import ConfigError
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers import RouterShape
from sparse_lm.moe.routers.sparse_mixer import SparseMixer, SparseMixerRouter, candidates, estimated
from sparse_lm.moe.types import RouterInputs
from sparse_lm.sharding import DEFAULT

LOGITS = np.array([2.0, 1.8, -3.0, 1.7])


def build(top_k: int = 2, jitter: float = 0.07, num_experts: int = 4) -> SparseMixerRouter:
    """A router whose logits are its input."""
    shape = RouterShape(num_experts, num_experts, top_k)
    router = SparseMixer(jitter).build(jax.random.key(0), shape, DEFAULT)
    assert isinstance(router, SparseMixerRouter)
    router.scores.weight_DE[...] = jnp.eye(num_experts)
    return router


def route(logits, top_k: int = 2, jitter: float = 0.07, key=None, mask=None, repeat: int = 1, dtype=jnp.float32):
    """The decisions for as many tokens with these logits, and the scores."""
    logits = np.asarray(logits)
    x_GSD = jnp.broadcast_to(jnp.asarray(logits, dtype), (1, repeat, len(logits)))
    mask_GS = jnp.ones((1, repeat), bool) if mask is None else jnp.asarray(mask)[None]
    inputs = RouterInputs(x_GSD, mask_GS, jnp.zeros((1, repeat), jnp.int32), repeat)
    decision, scores = jax.jit(lambda inputs: build(top_k, jitter, len(logits))(inputs, key))(inputs)
    return np.asarray(decision.expert_GSK[0]), np.asarray(decision.gate_GSK[0]), scores


@pytest.mark.parametrize(
    ("logits", "free", "jitter", "expected"),
    [
        # (2 - 1.8) / 2 = 0.1, (2 + 3) / 3 = 1.67, (2 - 1.7) / 2 = 0.15, against 2 * jitter
        (LOGITS, [1, 1, 1, 1], 0.07, [1, 1, 0, 0]),
        (LOGITS, [1, 1, 1, 1], 0.08, [1, 1, 0, 1]),
        (LOGITS, [1, 1, 1, 1], 0.04, [1, 0, 0, 0]),
        (LOGITS, [1, 1, 1, 1], 0.9, [1, 1, 1, 1]),
        # Without the best: (1.8 - 1.7) / 1.8 = 0.056
        (LOGITS, [0, 1, 1, 1], 0.03, [0, 1, 0, 1]),
        (LOGITS, [0, 0, 1, 0], 0.03, [0, 0, 1, 0]),
        # All negative: by the magnitude of their own, (4 - 3.5) / 4 = 0.125
        ([-3.5, -4.0, -7.0, -3.6], [1, 1, 1, 1], 0.07, [1, 1, 0, 1]),
        ([0.0, 0.0, -1e-6, 0.0], [1, 1, 1, 1], 0.07, [1, 1, 0, 1]),
    ],
)
def test_candidates_by_hand(logits, free, jitter, expected):
    got = candidates(jnp.asarray(logits, jnp.float32)[None, None], jnp.asarray(free, bool)[None, None], jitter)
    np.testing.assert_array_equal(got[0, 0], np.asarray(expected, bool))


def test_evaluation_by_hand():
    """0 against 1, then 1 against 3 (which is 5.6 % below): gates from softmaxes over each pair."""
    expert_SK, gate_SK, scores = route(LOGITS)
    np.testing.assert_array_equal(expert_SK, [[0, 1]])
    np.testing.assert_allclose(gate_SK, [[1 / (1 + np.exp(-0.2)), 1 / (1 + np.exp(-0.1))]], rtol=1e-5)
    powers = np.exp(LOGITS)
    np.testing.assert_allclose(scores.probability_GSE[0, 0], powers / powers.sum(), rtol=1e-5)
    np.testing.assert_allclose(scores.logsumexp_GS, np.log(powers.sum()), rtol=1e-5)


def test_without_an_alternative_the_gate_is_one_in_training_too():
    for key in (None, jax.random.key(1)):
        expert_SK, gate_SK, _ = route(LOGITS, 1, 0.04, key)
        np.testing.assert_array_equal(expert_SK, [[0]])
        np.testing.assert_allclose(gate_SK, 1, rtol=1e-6)


def test_draws_follow_the_softmax_over_the_candidates_and_shares_are_heuns():
    """Three candidates; the second choice is drawn from what is left, and the likeliest of each is always whole."""
    logits, number = [2.0, 1.9, -3.0, 1.6], 20_000
    expert_SK, gate_SK, _ = route(logits, 2, 0.11, jax.random.key(5), repeat=number)
    powers = {0: np.exp(2.0), 1: np.exp(1.9), 3: np.exp(1.6)}
    chi_squared = 0.0
    for first, second in itertools.permutations(powers, 2):
        left = {expert: power for expert, power in powers.items() if expert != first}
        gates = powers[first] / sum(powers.values()), left[second] / sum(left.values())
        drawn = (expert_SK == [first, second]).all(1)
        expected = number * gates[0] * gates[1]
        chi_squared += (drawn.sum() - expected) ** 2 / expected
        for choice, (expert, likeliest) in enumerate([(first, 0), (second, min(left))]):
            share = gate_SK[drawn, choice] / gates[choice]
            whole = np.isclose(share, 1, rtol=1e-4)
            assert np.all(whole | np.isclose(share, 1 / 3, rtol=1e-4))
            if expert == likeliest:
                assert whole.all()
            else:
                assert abs(whole.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / drawn.sum())
    assert chi_squared < 20.5  # 5 degrees of freedom, 0.999
    assert not (expert_SK == 2).any()


def test_the_same_key_draws_the_same_and_another_key_others():
    draws = [route(LOGITS, 2, 0.2, jax.random.key(seed), repeat=50)[0] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()
    assert np.all(draws[0][:, 0] != draws[0][:, 1])


def test_padding_and_a_bfloat16_input():
    expert_SK, gate_SK, scores = route(LOGITS, 2, 0.2, jax.random.key(1), [True, False], 2, jnp.bfloat16)
    assert np.all(expert_SK[0] >= 0) and np.all(expert_SK[1] == -1) and np.all(gate_SK[1] == 0)
    assert gate_SK.dtype == np.float32 and scores.probability_GSE.dtype == jnp.float32


# The gradient

EXPERT_OUTPUTS = np.array([0.7, -1.1, 0.4, 1.6])


def gradient(loss, logits, expert: int, share: float) -> np.ndarray:
    """d loss(gate * output of the expert) / d logits, as training computes it for one draw."""

    def of(logits_E):
        gate = estimated(jax.nn.softmax(logits_E)[None, None, expert], jnp.full((1, 1), share))
        return loss(gate[0, 0] * EXPERT_OUTPUTS[expert])

    with jax.enable_x64(True):
        return np.asarray(jax.grad(of)(jnp.asarray(logits, jnp.float64)))


def softmax(logits) -> np.ndarray:
    powers = np.exp(logits - np.max(logits))
    return powers / powers.sum()


def differences(function, logits, step: float = 1e-6) -> np.ndarray:
    """Central differences of a function of the logits."""
    rows = step * np.eye(len(logits))
    return np.array([(function(logits + row) - function(logits - row)) / (2 * step) for row in rows])


def test_gradient_of_one_draw_by_hand():
    """Two equal logits, expert 1, a third of its gate: the value is 1/6, the gradient that of the whole 1/2."""
    with jax.enable_x64(True):
        value = estimated(jnp.full((1, 1), 0.5), jnp.full((1, 1), 1 / 3))
        assert float(value[0, 0]) == pytest.approx(1 / 6)
    # d (gate)^2 / d logits = 2 * (share * gate) * gate * (1 - gate), at the value that was used
    got = gradient(lambda y: (y / EXPERT_OUTPUTS[1]) ** 2, np.zeros(2), 1, 1 / 3)
    np.testing.assert_allclose(got, np.array([-1, 1]) * 2 * (1 / 6) * 0.25, rtol=1e-6)


def test_with_a_whole_gate_it_is_the_exact_gradient():
    for expert in range(4):
        got = gradient(lambda y: jnp.sin(y) + y**2, LOGITS, expert, 1.0)

        def value(logits, expert=expert):
            y = softmax(logits)[expert] * EXPERT_OUTPUTS[expert]
            return np.sin(y) + y**2

        np.testing.assert_allclose(got, differences(value, LOGITS), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_the_mean_over_all_draws_is_the_gradient_of_the_expected_loss(degree):
    """Heun's rule is exact for losses up to the third degree of the output: the mean over experts and shares is then
    the gradient of sum_e p_e (loss(g_e) - loss(0)) with g_e held fixed, which is what sampling hides from backprop."""

    def loss(y):
        return 0.3 * y + (0.8 * y**2 if degree > 1 else 0) + (-0.5 * y**3 if degree > 2 else 0)

    chance = softmax(LOGITS)
    mean = sum(
        chance[expert] * weight * gradient(loss, LOGITS, expert, share)
        for expert in range(4)
        for share, weight in ((1.0, 0.25), (1 / 3, 0.75))
    )
    fixed = np.array([loss(chance[expert] * EXPERT_OUTPUTS[expert]) for expert in range(4)])
    np.testing.assert_allclose(mean, differences(lambda logits: softmax(logits) @ fixed, LOGITS), rtol=1e-6, atol=1e-9)


def test_the_whole_gate_alone_would_be_wrong_for_a_curved_loss():
    """What the shares are for: backpropagation through the gate of the drawn expert misses the curvature."""
    chance = softmax(LOGITS)
    plain = sum(chance[expert] * gradient(lambda y: y**2, LOGITS, expert, 1.0) for expert in range(4))
    fixed = (chance * EXPERT_OUTPUTS) ** 2
    exact = differences(lambda logits: softmax(logits) @ fixed, LOGITS)
    np.testing.assert_allclose(plain, 2 * exact, rtol=1e-6)


def test_gradient_of_the_router_reaches_candidates_alone():
    """Experts beyond the threshold get nothing, nor does a token without an alternative."""
    key = jax.random.key(3)

    def total(x_GSD, jitter):
        mask_GS = jnp.ones((1, 1), bool)
        decision, _ = build(1, jitter)(RouterInputs(x_GSD, mask_GS, jnp.zeros((1, 1), jnp.int32), 1), key)
        return jnp.sum(decision.gate_GSK)

    x_GSD = jnp.asarray(LOGITS, jnp.float32)[None, None]
    got = np.asarray(jax.grad(total)(x_GSD, 0.07))[0, 0]
    share = 1 / (1 + np.exp(-0.2))
    np.testing.assert_allclose(np.abs(got), [share * (1 - share)] * 2 + [0, 0], rtol=1e-4)
    assert got[0] == pytest.approx(-got[1])
    np.testing.assert_allclose(jax.grad(total)(x_GSD, 0.04), 0, atol=1e-7)


def test_refusals():
    with pytest.raises(ConfigError, match=r"config\.router\.kind='sparse_mixer'.*top_k=num_experts=4 the last choice"):
        MoEConfig(num_experts=4, top_k=4, router=SparseMixer())
    assert MoEConfig(num_experts=4, top_k=3, router=SparseMixer()).causal
    with pytest.raises(ConfigError, match=r"jitter=0\.0: must be greater than 0"):
        SparseMixer(jitter=0.0)
