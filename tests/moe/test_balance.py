"""Router losses against their formulas: values by hand, published ones, scopes, microbatches, padding."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.moe.balance import entropy, load_balance, max_violation, router_losses, weighted, z_loss
from sparse_lm.moe.types import RouterStats


def stats_of(load_UE, importance_UE, tokens_U, z_U=None) -> RouterStats:
    """Statistics of one layer."""
    load, importance = jnp.asarray([load_UE], jnp.int32), jnp.asarray([importance_UE], jnp.float32)
    tokens = jnp.asarray([tokens_U], jnp.int32)
    zero = jnp.zeros(tokens.shape)
    z = zero if z_U is None else jnp.asarray([z_U], jnp.float32)
    return RouterStats(tokens, 0 * tokens, 0 * tokens, load, importance, z, zero, zero)


def test_the_total_by_hand():
    stats = dataclasses.replace(stats_of([[2, 2]], [[2.0, 2.0]], [4], [8.0]), entropy_U=jnp.asarray([[6.0]]))
    losses = router_losses(stats, jnp.asarray(4))
    np.testing.assert_allclose([losses["load"], losses["z"], losses["entropy"]], [[1.0], [2.0], [1.5]], rtol=1e-6)
    np.testing.assert_allclose(entropy(stats, jnp.asarray(4)), [1.5])
    np.testing.assert_allclose(weighted(losses, {"load": 0.5, "z": 0.25, "entropy": -1.0}), -0.5, rtol=1e-6)
    assert weighted(losses, {}) == 0


def test_a_weight_without_its_loss_is_an_error():
    with pytest.raises(ValueError, match="importance"):
        weighted({"load": jnp.ones(2)}, {"load": 1.0, "importance": 0.1})


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_one_at_perfect_balance_for_every_k(top_k):
    stats = stats_of([[2 * top_k] * 8], [[2.0] * 8], [16])
    np.testing.assert_allclose(load_balance(stats, jnp.asarray(16)), [1.0], rtol=1e-6)


@pytest.mark.parametrize("num_experts", [2, 8])
def test_the_number_of_experts_at_collapse(num_experts):
    one_hot = [10.0] + [0.0] * (num_experts - 1)
    stats = stats_of([[int(value) for value in one_hot]], [one_hot], [10])
    np.testing.assert_allclose(load_balance(stats, jnp.asarray(10)), [num_experts], rtol=1e-6)


def test_gshard_loss_of_vmoe():
    """The example of V-MoE's tests; f counts first choices there, as here with k = 1."""
    gate_SE = np.array([[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]])
    load_E = np.bincount(gate_SE.argmax(-1), minlength=3)
    stats = stats_of([load_E], [gate_SE.sum(0)], [4])
    np.testing.assert_allclose(load_balance(stats, jnp.asarray(4)), [1.0875], rtol=1e-6)


LOAD, IMPORTANCE, TOKENS = [[3, 1], [0, 2]], [[2.5, 1.5], [0.5, 1.5]], [4, 2]


def test_scopes_by_hand():
    stats, tokens = stats_of(LOAD, IMPORTANCE, TOKENS), jnp.asarray(6)
    # Per unit: 2 * (3/4 * 2.5/4 + 1/4 * 1.5/4) = 1.125 and 2 * (1.5/2) = 1.5; together 1.25.
    np.testing.assert_allclose(load_balance(stats, tokens), [1.25], rtol=1e-6)
    # Whole batch: f = (3/6, 3/6), P = (3/6, 3/6).
    whole = jnp.asarray([[3, 3]])
    np.testing.assert_allclose(load_balance(stats, tokens, whole), [1.0], rtol=1e-6)


@pytest.mark.parametrize("whole", [None, [[3, 3]]])
def test_microbatches_add_up(whole):
    load = None if whole is None else jnp.asarray(whole)
    parts = [
        load_balance(stats_of(LOAD[u : u + 1], IMPORTANCE[u : u + 1], TOKENS[u : u + 1]), jnp.asarray(6), load)
        for u in range(2)
    ]
    total = load_balance(stats_of(LOAD, IMPORTANCE, TOKENS), jnp.asarray(6), load)
    np.testing.assert_allclose(parts[0] + parts[1], total, rtol=1e-6)


def test_a_unit_of_padding_counts_nothing():
    padded = stats_of([*LOAD, [0, 0]], [*IMPORTANCE, [0.0, 0.0]], [*TOKENS, 0], [4.0, 2.0, 0.0])
    plain = stats_of(LOAD, IMPORTANCE, TOKENS, [4.0, 2.0])
    np.testing.assert_allclose(load_balance(padded, jnp.asarray(6)), load_balance(plain, jnp.asarray(6)), rtol=1e-7)
    np.testing.assert_allclose(z_loss(padded, jnp.asarray(6)), [1.0], rtol=1e-6)


def test_an_empty_batch_gives_zero_and_not_nan():
    empty = stats_of([[0, 0]], [[0.0, 0.0]], [0])
    np.testing.assert_array_equal(load_balance(empty, jnp.asarray(0)), [0.0])
    np.testing.assert_array_equal(z_loss(empty, jnp.asarray(0)), [0.0])


def test_no_gradient_flows_through_the_loads():
    def loss(importance_UE):
        stats = stats_of(LOAD, IMPORTANCE, TOKENS)
        moved = RouterStats(**{**vars(stats), "importance_UE": importance_UE})
        return load_balance(moved, jnp.asarray(6))[0]

    gradient = jax.grad(loss)(jnp.asarray([IMPORTANCE]))
    np.testing.assert_allclose(gradient[0], [[2 * 0.75 / 6, 2 * 0.25 / 6], [0, 2 / 6]], rtol=1e-6)


def test_layers_are_separate():
    one, two = stats_of(LOAD, IMPORTANCE, TOKENS), stats_of([[2, 2], [1, 1]], IMPORTANCE, TOKENS)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), one, two)
    np.testing.assert_allclose(load_balance(both, jnp.asarray(6)), [1.25, 1.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("load", "expected"), [([2, 2, 2, 2], 0.0), ([8, 0, 0, 0], 3.0), ([3, 1, 2, 2], 0.5), ([0, 0], -1.0)]
)
def test_max_violation(load, expected):
    np.testing.assert_allclose(max_violation(jnp.asarray(load)), expected, rtol=1e-6)
    np.testing.assert_allclose(max_violation(jnp.asarray([load, load])), [expected] * 2, rtol=1e-6)
