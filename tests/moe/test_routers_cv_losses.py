"""Importance and load losses: the numbers that V-MoE and Tutel publish, tables by hand, and sums over groups."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.moe.routers.cv_losses import CvLosses, chance_of_top_k, chosen, squared_variation

# V-MoE's own tests of its router losses.
GATES_SE = np.array([[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]], np.float32)
LOGITS_SE = np.array([[0.9, 0.06, 0.04], [0.7, 0.18, 0.12], [0.85, 0.05, 0.1]], np.float32)
NOISE_SE = np.array([[-0.037, 0.026, -0.018], [-0.074, 0.045, -0.015], [-0.067, -0.059, 0.073]], np.float32)


def test_the_importance_loss_is_that_of_vmoe():
    loss = squared_variation(jnp.asarray(GATES_SE.sum(0))[None])
    np.testing.assert_allclose(loss, [0.03874999], rtol=1e-6)


def test_tutel_divides_the_variance_by_one_less():
    """docs/conventions.md: E / (E - 1) times ours."""
    loss = squared_variation(jnp.asarray(GATES_SE.sum(0))[None])
    np.testing.assert_allclose(loss * 3 / 2, [0.058125], rtol=1e-6)


def test_the_load_loss_is_that_of_vmoe():
    chance_GSE = chance_of_top_k(jnp.asarray(LOGITS_SE[None]), jnp.asarray(LOGITS_SE[None] + NOISE_SE), 0.1, 2, "all")
    np.testing.assert_allclose(squared_variation(chance_GSE.sum(1)), [0.485738645], rtol=1e-6)


@pytest.mark.parametrize(
    ("total_E", "expected"),
    [
        ([2.0, 2.0, 2.0], 0.0),
        ([3.0, 1.0], 0.25),  # mean 2, variance 1
        ([4.0, 0.0, 0.0, 0.0], 3.0),  # everything to one of E: E - 1
        ([0.0, 0.0], 0.0),  # no token at all
    ],
)
def test_squared_variation_by_hand(total_E, expected):
    total_GE = jnp.asarray([total_E])
    np.testing.assert_allclose(squared_variation(total_GE), [expected], atol=1e-7)
    np.testing.assert_allclose(squared_variation(1000 * total_GE), [expected], atol=1e-6)
    assert np.all(np.isfinite(jax.grad(lambda x: squared_variation(x).sum())(total_GE)))


def phi(z: float) -> float:
    return 0.5 * (1 + math.erf(z / 2**0.5))


def test_chances_by_hand():
    """Clean (1, 0, -1), noisy (0.5, 0.8, -2), k = 1, so that the first expert lost its lead to noise."""
    clean, noisy = jnp.asarray([[[1.0, 0.0, -1.0]]]), jnp.asarray([[[0.5, 0.8, -2.0]]])
    std = jnp.asarray([[[0.5, 1.0, 2.0]]])
    one = chance_of_top_k(clean, noisy, std, 1, "one")
    # Experts 0 and 2 have to beat 0.8; expert 1, which won, only the best of the others: 0.5.
    np.testing.assert_allclose(one[0, 0], [phi(0.2 / 0.5), phi(-0.5), phi(-1.8 / 2)], rtol=1e-5)
    everyone = chance_of_top_k(clean, noisy, std, 1, "all")
    np.testing.assert_allclose(everyone[0, 0], [phi(0.2 / 0.5), phi(-0.8), phi(-1.8 / 2)], rtol=1e-5)


@pytest.mark.parametrize("redraw", ["one", "all"])
def test_with_all_experts_chosen_every_chance_is_one(redraw):
    logits_GSE = jnp.asarray(LOGITS_SE[None])
    np.testing.assert_array_equal(chance_of_top_k(logits_GSE, logits_GSE, 0.1, 3, redraw), 1)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_chance_is_a_frequency(top_k):
    """The noise of one expert is drawn again and again, that of the others kept."""
    draws, expert = 4000, 1
    clean = jnp.asarray([0.3, 0.1, -0.2, 0.4])
    std = jnp.asarray([0.5, 0.7, 0.3, 0.6])
    noise = jax.random.normal(jax.random.key(0), (4,))
    again = jax.random.normal(jax.random.key(1), (draws,))
    noisy = jnp.tile(clean + std * noise, (draws, 1)).at[:, expert].set(clean[expert] + std[expert] * again)
    frequency = np.mean(np.any(np.asarray(jax.lax.top_k(noisy, top_k)[1]) == expert, axis=1))
    chance = chance_of_top_k(clean[None, None], noisy[None, :1], std[None, None], top_k, "one")[0, 0, expert]
    np.testing.assert_allclose(frequency, chance, atol=4 * 0.5 / draws**0.5)


def test_less_noise_brings_the_chance_to_the_choice():
    clean = jnp.asarray([[[0.3, 0.1, -0.2, 0.4]]])
    sharp = chance_of_top_k(clean, clean, 1e-3, 2, "one")
    np.testing.assert_allclose(sharp, chosen(jax.lax.top_k(clean, 2)[1], 1.0, 4), atol=1e-6)


def test_chosen_puts_weights_at_their_experts():
    weights = chosen(jnp.asarray([[[2, 0], [1, -1]]]), jnp.asarray([[[0.7, 0.3], [1.0, 0.5]]]), 3)
    np.testing.assert_allclose(weights[0], [[0.3, 0, 0.7], [0, 1, 0]])


def test_the_penalty_is_per_group_and_leaves_padding_out():
    losses = CvLosses(importance=2.0, load=3.0)
    gates = np.stack([GATES_SE, GATES_SE[::-1]])
    load = np.stack([[[1.0, 0, 0]] * 4, [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [5, 5, 5]]])
    mask = np.array([[True] * 4, [True, True, True, False]])
    penalty_GS = losses.penalty(jnp.asarray(gates), jnp.asarray(load, jnp.float32), jnp.asarray(mask))
    first = 2 * 0.03875 + 3 * 2.0  # all load on one of three
    rest = gates[1, :3].sum(0)
    second = 2 * rest.var() / rest.mean() ** 2  # the load of the real tokens is even
    np.testing.assert_allclose(penalty_GS, [[first] * 4, [second] * 4], rtol=1e-5)
    assert penalty_GS.dtype == jnp.float32


def test_a_group_of_padding_has_no_loss_and_no_gradient():
    def total(gates):
        return jnp.sum(CvLosses(1.0, 1.0).penalty(gates, gates, jnp.zeros((1, 4), bool)))

    value, gradient = jax.value_and_grad(total)(jnp.asarray(GATES_SE[None]))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_groups_add_up_however_they_are_cut():
    rng = np.random.default_rng(0)
    gates, load = (jnp.asarray(rng.random((6, 5, 4)), jnp.float32) for _ in range(2))
    mask = jnp.asarray(rng.random((6, 5)) < 0.7)
    losses = CvLosses(0.1, 0.2)
    whole = jnp.sum(losses.penalty(gates, load, mask) * mask)
    parts = sum(jnp.sum(losses.penalty(gates[i::3], load[i::3], mask[i::3]) * mask[i::3]) for i in range(3))
    np.testing.assert_allclose(whole, parts, rtol=1e-6)
