"""Reports of layers become one stack per kind, in the order of the layers, whichever layers make them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.models.reports import DepthStats, Reports, concatenate, flatten, stack


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
