"""Embeddings in both directions, and the three kinds of positions, against their formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.nn.embed import Embedding
from sparse_lm.nn.position import LearnedPositions, rotary, sinusoidal
from sparse_lm.sharding import DEFAULT

TOKENS_BL = jnp.asarray([[3, 0, 9], [9, 9, 1]])
POSITIONS_BL = jnp.asarray([[0, 1, 2], [5, 0, 7]])


def test_encode_scales_the_rows_of_the_table():
    embedding = Embedding(jax.random.key(0), 10, 16, DEFAULT)
    table = np.asarray(embedding.table_VD[...])
    np.testing.assert_allclose(embedding.encode(TOKENS_BL, jnp.float32), 4 * table[np.asarray(TOKENS_BL)], rtol=1e-6)
    assert embedding.encode(TOKENS_BL, jnp.bfloat16).dtype == jnp.bfloat16


def test_decode_is_the_unscaled_table_and_float32():
    embedding = Embedding(jax.random.key(0), 10, 16, DEFAULT)
    x_BLD = jax.random.normal(jax.random.key(1), (2, 3, 16))
    expected = np.asarray(x_BLD, np.float64) @ np.asarray(embedding.table_VD[...], np.float64).T
    np.testing.assert_allclose(embedding.decode(x_BLD), expected, rtol=1e-4, atol=1e-5)
    assert embedding.decode(x_BLD.astype(jnp.bfloat16)).dtype == jnp.float32


def test_tokens_come_in_with_unit_variance_and_gradients_reach_only_their_rows():
    embedding = Embedding(jax.random.key(0), 500, 64, DEFAULT)
    np.testing.assert_allclose(np.std(embedding.encode(jnp.arange(500)[None], jnp.float32)), 1.0, rtol=0.02)

    gradients = jax.grad(lambda module: module.encode(TOKENS_BL, jnp.float32).sum())(embedding)
    gradient = np.asarray(gradients.table_VD[...])
    np.testing.assert_allclose(gradient[[0, 1, 3, 9], 0], [8, 8, 8, 24])
    assert np.count_nonzero(gradient.any(-1)) == 4


@pytest.mark.parametrize("sizes", [{"data": 2, "model": 2}, {"fsdp": 2, "expert": 1}])
def test_embedding_on_a_mesh(mesh_of, sizes):
    embedding = Embedding(jax.random.key(0), 10, 16, DEFAULT)

    def both(embedding, tokens):
        x_BLD = embedding.encode(tokens, jnp.float32)
        return x_BLD, embedding.decode(x_BLD)

    expected = both(embedding, TOKENS_BL)
    with jax.set_mesh(mesh_of(**sizes)):
        stored = DEFAULT.shard_parameters(embedding)
        got = jax.jit(both)(stored, DEFAULT.constrain(TOKENS_BL, "BL"))
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_rotary_by_hand():
    x_BLHI = jnp.broadcast_to(jnp.asarray([1.0, 2.0, 3.0, 4.0]), (2, 3, 1, 4))
    got = np.asarray(rotary(x_BLHI, POSITIONS_BL, 100.0))[:, :, 0]
    for b, t in np.ndindex(2, 3):
        for i, frequency in enumerate((1.0, 0.1)):  # pairs (0, 2) and (1, 3)
            angle = float(POSITIONS_BL[b, t]) * frequency
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            np.testing.assert_allclose(got[b, t, [i, i + 2]], turn @ [i + 1, i + 3], rtol=1e-5, atol=1e-6)


def test_rotary_keeps_lengths_and_products_depend_on_the_distance():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def product(m, n):
        one, two = (rotary(x, jnp.full((1, 1), p), 10_000.0) for x, p in ((query, m), (key, n)))
        return float(jnp.sum(one * two))

    np.testing.assert_allclose(product(3, 1), product(103, 101), rtol=1e-4)
    assert abs(product(3, 1) - product(3, 2)) > 1e-3
    turned = rotary(query, jnp.full((1, 1), 50), 10_000.0)
    np.testing.assert_allclose(jnp.linalg.norm(turned), jnp.linalg.norm(query), rtol=1e-5)
    assert rotary(query.astype(jnp.bfloat16), jnp.zeros((1, 1), jnp.int32), 100.0).dtype == jnp.bfloat16


def test_sinusoidal_by_hand():
    got = np.asarray(sinusoidal(POSITIONS_BL, 4))
    for b, t in np.ndindex(2, 3):
        p = float(POSITIONS_BL[b, t])
        expected = [np.sin(p), np.sin(p / 100), np.cos(p), np.cos(p / 100)]
        np.testing.assert_allclose(got[b, t], expected, rtol=1e-5, atol=1e-6)


def test_learned_positions_are_rows_of_a_small_table():
    positions = LearnedPositions(jax.random.key(0), 64, 128, DEFAULT)
    np.testing.assert_allclose(np.std(positions.table_LD[...]), 0.02, rtol=0.03)
    np.testing.assert_array_equal(positions(POSITIONS_BL, jnp.float32), positions.table_LD[...][POSITIONS_BL])
    assert positions(POSITIONS_BL, jnp.bfloat16).dtype == jnp.bfloat16
