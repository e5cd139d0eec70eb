"""Grouped products against one product per expert: loads of all kinds, both gradients, block sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm.moe.grouped import Blocks, block_size, grouped_product

D, F = 5, 3


def placed(counts, blocks: Blocks, rng):
    """Rows of every expert in its blocks, zeros elsewhere; and the expert of each row, -1 for empty ones."""
    x = np.zeros((blocks.total * blocks.size, D), np.float32)
    expert = np.full(len(x), -1)
    for e, count in enumerate(counts):
        start = int(blocks.first_E[e]) * blocks.size
        x[start : start + count] = rng.normal(size=(count, D))
        expert[start : start + count] = e
    return x, expert


def check(counts, rows=None):
    rng = np.random.default_rng(0)
    blocks = Blocks.of(jnp.asarray(counts, jnp.int32), rows or max(sum(counts), 1))
    x, expert = placed(counts, blocks, rng)
    w = rng.normal(size=(len(counts), D, F)).astype(np.float32)
    dy = np.where(expert[:, None] >= 0, rng.normal(size=(len(x), F)), 0).astype(np.float32)
    y, pull = jax.vjp(lambda x, w: grouped_product(x, w, blocks), jnp.asarray(x), jnp.asarray(w))
    dx, dw = pull(jnp.asarray(dy))
    one_hot = expert[:, None] == np.arange(len(counts))
    exact = [a.astype(np.float64) for a in (x, w, dy)]
    np.testing.assert_allclose(y, np.einsum("re,rd,edf->rf", one_hot, exact[0], exact[1]), atol=1e-5)
    np.testing.assert_allclose(dx, np.einsum("re,rf,edf->rd", one_hot, exact[2], exact[1]), atol=1e-5)
    np.testing.assert_allclose(dw, np.einsum("re,rd,rf->edf", one_hot, exact[0], exact[2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "counts",
    [[4, 4, 4], [0, 12, 0], [0, 0, 0], [1, 0, 7], [8, 16, 24], [9, 17, 25], [300, 1, 0, 130]],
    ids=["even", "one", "none", "few", "blocks", "over", "large"],
)
def test_every_row_meets_its_expert(counts):
    check(counts)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 30))
def test_any_loads(counts, spare):
    check(counts, max(sum(counts), 1) + spare)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=64))
def test_there_is_always_room(counts):
    blocks = Blocks.of(jnp.asarray(counts, jnp.int32), max(sum(counts), 1))
    assert int(jnp.sum(blocks.number_E)) <= blocks.total
    used = np.asarray(blocks.number_E) * blocks.size
    assert np.all(used >= counts) and np.all(used < np.asarray(counts) + blocks.size)
    np.testing.assert_array_equal(blocks.first_E, np.cumsum(blocks.number_E) - blocks.number_E)


@pytest.mark.parametrize(("rows", "experts", "size"), [(8192, 8, 256), (8192, 128, 32), (16, 8, 8), (1, 64, 8)])
def test_blocks_shrink_where_they_would_be_half_empty(rows, experts, size):
    assert block_size(rows, experts) == size


def test_bfloat16_accumulates_in_float32():
    blocks = Blocks.of(jnp.asarray([2], jnp.int32), 2)
    x = jnp.zeros((blocks.total * blocks.size, 4096), jnp.bfloat16).at[:2].set(1)
    w = jnp.full((1, 4096, 1), 2.0**-9, jnp.bfloat16)
    y = grouped_product(x, w, blocks)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y[:2, 0], [8.0, 8.0])  # a bfloat16 sum would stop at 1 or 2
    dw = jax.grad(lambda w: jnp.sum(grouped_product(x, w, blocks).astype(jnp.float32)))(w)
    assert dw.dtype == jnp.bfloat16
