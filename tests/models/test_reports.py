"""Reports of layers become one stack per kind, in the order of the layers, whichever layers make them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.models.reports import DepthStats, Reports, concatenate, flatten, join, stack
from sparse_lm.moe.types import DispatchStats, LayerStats, RouterStats
from sparse_lm.sharding import DEFAULT


def depth(number) -> DepthStats:
    return DepthStats(**{field.name: jnp.asarray(number) for field in dataclasses.fields(DepthStats)})


def test_layers_are_stacked_in_order_where_they_report():
    stacked = stack([Reports(), Reports(depth=depth(3)), Reports(), Reports(depth=depth(5))])
    assert stacked.feed_forward is None
    assert stacked.depth is not None
    np.testing.assert_array_equal(stacked.depth.chosen, [3, 5])


def test_runs_are_concatenated_and_none_stays_none():
    one, two = Reports(depth=depth([1, 2])), Reports(depth=depth([3]))
    joined = concatenate([one, Reports(), two])
    assert joined.depth is not None
    np.testing.assert_array_equal(joined.depth.loss, [1, 2, 3])
    assert concatenate([Reports(), Reports()]) == Reports()


def test_repeats_come_before_the_layers_of_a_unit():
    flat = flatten(Reports(depth=depth([[1, 2], [3, 4], [5, 6]])))
    assert flat.depth is not None
    np.testing.assert_array_equal(flat.depth.skipped, [1, 2, 3, 4, 5, 6])
    assert flatten(Reports()) == Reports()


def test_reports_add_over_microbatches():
    one, two = Reports(depth=depth([1, 2])), Reports(depth=depth([10, 20]))
    total = jax.tree.map(jnp.add, one, two)
    np.testing.assert_array_equal(total.depth.processed, [11, 22])


def test_joined_microbatches_have_the_units_of_all_and_the_sums_of_the_rest():
    """Two microbatches of one layer with two units each."""
    counts = {name: jnp.asarray([[[1, 2]], [[3, 4]]]) for name in RouterStats.__annotations__}
    counts["load_UE"] = counts["importance_UE"] = jnp.arange(12).reshape(2, 1, 2, 3)
    sums = {name: jnp.asarray([[5], [6]]) for name in DispatchStats.__annotations__}
    joined = join(Reports(LayerStats(RouterStats(**counts), DispatchStats(**sums)), depth=depth([[1], [2]])), DEFAULT)
    assert joined.feed_forward is not None and joined.depth is not None
    assert sorted(joined.feed_forward.router.tokens_U[0].tolist()) == [1, 2, 3, 4]
    units = {tuple(unit) for unit in joined.feed_forward.router.load_UE[0].tolist()}
    assert units == {(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)}
    assert joined.feed_forward.dispatch.kept.tolist() == [11]
    assert joined.depth.chosen.tolist() == [3]
    assert joined.attention is None
