"""Where rows lie, by hand; counts that have no room never pass for a result."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.moe.grouped import KERNELS, Layout, grouped_product


def test_blocks_by_hand():
    layout = Layout.of(jnp.asarray([3, 0, 5, 4]), size=4, total=6)
    np.testing.assert_array_equal(layout.first_E, [0, 1, 1, 3])
    np.testing.assert_array_equal(layout.number_E, [1, 0, 2, 1])
    np.testing.assert_array_equal(layout.first_row_E, [0, 4, 4, 12])
    assert (layout.rows, int(layout.used), bool(layout.fits)) == (24, 16, True)
    np.testing.assert_array_equal(layout.expert_R, [0] * 4 + [2] * 8 + [3] * 12)


def test_rows_side_by_side_by_hand():
    layout = Layout.of(jnp.asarray([0, 2, 0, 3]), size=1, total=7)
    np.testing.assert_array_equal(layout.first_row_E, [0, 0, 2, 2])
    assert (layout.rows, int(layout.used)) == (7, 5)
    np.testing.assert_array_equal(layout.expert_R, [1, 1, 3, 3, 3, 3, 3])


@pytest.mark.parametrize("counts", [[5, 4], [9, 0], [-1, 3]])
@pytest.mark.parametrize("size", [1, 4])
def test_known_counts_without_room_raise(counts, size):
    with pytest.raises(ValueError, match=rf"\[{counts[0]}, {counts[1]}\] do not fit in .* for more rows"):
        Layout.of(jnp.asarray(counts), size, 8 // size if size == 1 else 1)


@pytest.mark.parametrize("name", ["blocks", "ragged_dot"])
@pytest.mark.parametrize(("counts", "good"), [([6, 2], True), ([6, 200], False), ([0, 0], True), ([-1, 4], False)])
def test_counts_of_run_time_without_room_give_nan(name, counts, good):
    kernel = KERNELS[name]

    @jax.jit
    def product(count_E):
        layout = kernel.layout(count_E, 8)
        x, w = jnp.ones((layout.rows, 3)), jnp.ones((2, 3, 2))
        y, pull = jax.vjp(lambda x, w: grouped_product(x, w, layout, kernel), x, w)
        return y, pull(y)[0]

    for result in product(jnp.asarray(counts)):
        assert np.all(np.isfinite(result)) if good else np.all(np.isnan(result))
