"""Sums over a decision, counted by hand."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.moe.stats import dispatch_stats, router_stats, unaccounted
from sparse_lm.moe.types import HISTOGRAM_BINS, POSITION_BINS, LayerStats, Scores, TokenChoice
from sparse_lm.sharding import DEFAULT

# Two groups of two tokens, two choices of three experts. Token (0, 1) declines its second choice, (1, 1) is padding.
EXPERT = jnp.asarray([[[0, 1], [2, -1]], [[0, 2], [-1, -1]]])
GATE = jnp.asarray([[[0.5, 0.25], [0.97, 0.0]], [[0.6, 0.4], [0.0, 0.0]]])
MASK = jnp.asarray([[True, True], [True, False]])
KEPT = jnp.asarray([[[True, False], [True, False]], [[True, True], [False, False]]])
PROBABILITY = jnp.asarray([[[0.5, 0.25, 0.25], [0.03, 0.0, 0.97]], [[0.6, 0.0, 0.4], [0.2, 0.3, 0.5]]])
SCORES = Scores(PROBABILITY, jnp.asarray([[1.0, 2.0], [3.0, 100.0]]))
DECISION = TokenChoice(EXPERT, GATE)


def entropy(*probabilities: float) -> float:
    return -sum(p * np.log(p) for p in probabilities)


def test_router_sums_per_group():
    stats = router_stats(DECISION, SCORES, MASK, 2, DEFAULT)
    np.testing.assert_array_equal(stats.tokens_U, [2, 1])
    np.testing.assert_array_equal(stats.padding_U, [0, 1])
    np.testing.assert_array_equal(stats.declined_U, [1, 0])
    np.testing.assert_array_equal(stats.load_UE, [[1, 1, 1], [1, 0, 1]])
    np.testing.assert_allclose(stats.importance_UE, [[0.53, 0.25, 1.22], [0.6, 0, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(stats.z_U, [5.0, 9.0])
    first = entropy(0.5, 0.25, 0.25) + entropy(0.03, 0.97)
    np.testing.assert_allclose(stats.entropy_U, [first, entropy(0.6, 0.4)], rtol=1e-6)


@pytest.mark.parametrize("unit", [1, 2, 4])
def test_units_only_regroup_the_sums(unit):
    stats = router_stats(DECISION, SCORES, MASK, unit, DEFAULT)
    whole = router_stats(DECISION, SCORES, MASK, 4, DEFAULT)
    for field in dataclasses.fields(stats):
        value = getattr(stats, field.name)
        assert value.shape[0] == 4 // unit
        np.testing.assert_allclose(value.sum(0), getattr(whole, field.name)[0], rtol=1e-6)


def test_dispatch_counts():
    stats = dispatch_stats(DECISION, KEPT, MASK, 3)
    assert (int(stats.kept), int(stats.dropped)) == (4, 1)
    np.testing.assert_array_equal(stats.dropped_E, [0, 1, 0])
    np.testing.assert_array_equal(stats.served, [0, 2, 1])
    assert int(stats.served.sum()) == int(MASK.sum())
    expected = np.zeros(HISTOGRAM_BINS, int)
    expected[[10, 19, 12, 8]] = 1  # gates 0.5, 0.97, 0.6, 0.4 in bins of 0.05
    np.testing.assert_array_equal(stats.gate_histogram, expected)
    np.testing.assert_allclose(stats.gate_mass, 2.72, rtol=1e-6)
    np.testing.assert_allclose(stats.kept_gate_mass, 2.47, rtol=1e-6)


def test_positions_are_equal_bins_of_a_group():
    stats = dispatch_stats(DECISION, KEPT, MASK, 3)
    routed, dropped = np.zeros(POSITION_BINS, int), np.zeros(POSITION_BINS, int)
    routed[0], routed[POSITION_BINS // 2], dropped[0] = 4, 1, 1
    np.testing.assert_array_equal(stats.routed_by_position, routed)
    np.testing.assert_array_equal(stats.dropped_by_position, dropped)
    size = 3 * POSITION_BINS
    long = TokenChoice(jnp.zeros((2, size, 1), jnp.int32), jnp.ones((2, size, 1)))
    stats = dispatch_stats(long, jnp.zeros((2, size, 1), bool), jnp.ones((2, size), bool), 1)
    np.testing.assert_array_equal(stats.dropped_by_position, [6] * POSITION_BINS)


def test_a_gate_of_one_is_in_the_last_bin():
    one = TokenChoice(jnp.zeros((1, 1, 1), jnp.int32), jnp.ones((1, 1, 1)))
    stats = dispatch_stats(one, jnp.ones((1, 1, 1), bool), jnp.ones((1, 1), bool), 1)
    assert int(stats.gate_histogram[-1]) == 1


def test_nothing_is_unaccounted_and_a_lost_assignment_shows():
    router = router_stats(DECISION, SCORES, MASK, 2, DEFAULT)
    dispatch = dispatch_stats(DECISION, KEPT, MASK, 3)
    assert int(unaccounted(LayerStats(router, dispatch), 2)) == 0
    lost = dataclasses.replace(dispatch, kept=dispatch.kept - 1)
    assert int(unaccounted(LayerStats(router, lost), 2)) == -1


def test_layers_may_be_stacked_in_front():
    one = LayerStats(router_stats(DECISION, SCORES, MASK, 2, DEFAULT), dispatch_stats(DECISION, KEPT, MASK, 3))
    router = {name: jnp.stack([value] * 3) for name, value in vars(one.router).items()}
    dispatch = {name: jnp.stack([value] * 3) for name, value in vars(one.dispatch).items()}
    stacked = LayerStats(type(one.router)(**router), type(one.dispatch)(**dispatch))
    np.testing.assert_array_equal(unaccounted(stacked, 2), [0, 0, 0])
