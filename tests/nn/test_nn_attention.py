"""Attention against a loop over heads and queries; grouped queries; masks; the cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.nn.attend import continued_sight, row_sight
from sparse_lm.nn.attention import Attention
from sparse_lm.nn.cache import KeyValues
from sparse_lm.nn.heads import AttentionShape
from sparse_lm.sharding import DEFAULT

BATCH, LENGTH, WIDTH, HEADS, KV_HEADS, HEAD = 2, 5, 6, 4, 2, 4
X_BLD = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, WIDTH))
POSITIONS_BL = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
SEGMENTS_BL = jnp.asarray([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]])
run = jax.jit(lambda layer, *inputs: layer(*inputs))


def build(kv_heads: int = KV_HEADS, rope: float | None = None, rate: float = 0.0) -> Attention:
    return Attention(jax.random.key(0), AttentionShape(WIDTH, HEADS, kv_heads, HEAD, rope, rate), DEFAULT)


def looped(layer: Attention, x_BLD, mask_BLT) -> np.ndarray:
    """One query of one head at a time, in float64; no rotation."""
    names = ("query_DHI", "key_DJI", "value_DJI", "out_HID")
    query, key, value, out = (np.asarray(getattr(layer, name)[...], np.float64) for name in names)
    x, y, group = np.asarray(x_BLD, np.float64), np.zeros(x_BLD.shape), HEADS // key.shape[1]
    for b, t, h in np.ndindex(BATCH, LENGTH, HEADS):
        seen = [s for s in range(LENGTH) if mask_BLT[b, t, s]]
        if seen:
            scores = [x[b, t] @ query[:, h] @ (x[b, s] @ key[:, h // group]) / HEAD**0.5 for s in seen]
            weights = np.exp(scores) / np.sum(np.exp(scores))
            mixed = sum(w * (x[b, s] @ value[:, h // group]) for w, s in zip(weights, seen, strict=True))
            y[b, t] += mixed @ out[h]
    return y


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_loop(kv_heads):
    layer, sight = build(kv_heads), row_sight(SEGMENTS_BL)
    y_BLD, cache = run(layer, X_BLD, POSITIONS_BL, sight)
    assert cache is None
    real = np.asarray(SEGMENTS_BL) > 0
    np.testing.assert_allclose(np.asarray(y_BLD)[real], looped(layer, X_BLD, sight.mask())[real], rtol=1e-4, atol=1e-5)
    assert np.all(np.isfinite(y_BLD))


def test_grouped_queries_are_repeated_heads():
    grouped, full = build(2, 100.0), build(4, 100.0)
    full.query_DHI, full.out_HID = grouped.query_DHI, grouped.out_HID
    full.key_DJI[...] = jnp.repeat(grouped.key_DJI[...], 2, axis=1)
    full.value_DJI[...] = jnp.repeat(grouped.value_DJI[...], 2, axis=1)
    sight = row_sight(SEGMENTS_BL)
    one, two = (run(layer, X_BLD, POSITIONS_BL, sight)[0] for layer in (grouped, full))
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_rotation_sees_distances_only_and_does_see_them():
    layer, sight = build(rope=100.0), row_sight(SEGMENTS_BL)
    plain = run(layer, X_BLD, POSITIONS_BL, sight)[0]
    np.testing.assert_allclose(run(layer, X_BLD, POSITIONS_BL + 7, sight)[0], plain, rtol=1e-4, atol=1e-5)
    assert not np.allclose(run(layer, X_BLD, 2 * POSITIONS_BL, sight)[0], plain, atol=1e-3)


def test_a_cache_filled_in_two_parts_gives_the_same():
    layer, sight = build(rope=100.0), row_sight(SEGMENTS_BL)
    whole = run(layer, X_BLD, POSITIONS_BL, sight)[0]
    empty = jnp.zeros((BATCH, LENGTH, KV_HEADS, HEAD))
    cache, parts = KeyValues(empty, empty), []
    for start, end in ((0, 3), (3, 5)):
        part = slice(start, end)
        y_BLD, cache = run(
            layer,
            X_BLD[:, part],
            POSITIONS_BL[:, part],
            continued_sight(SEGMENTS_BL[:, part], SEGMENTS_BL, start),
            None,
            (cache, jnp.asarray(start)),
        )
        parts.append(y_BLD)
    real = np.asarray(SEGMENTS_BL) > 0
    np.testing.assert_allclose(np.concatenate(parts, 1)[real], np.asarray(whole)[real], rtol=1e-4, atol=1e-5)


def test_write_touches_only_its_place_and_keeps_the_type():
    empty = KeyValues(jnp.zeros((1, 4, 1, 1), jnp.bfloat16), jnp.zeros((1, 4, 1, 1), jnp.bfloat16))
    new = empty.write(jnp.ones((1, 2, 1, 1)), 2 * jnp.ones((1, 2, 1, 1)), jnp.asarray(1))
    np.testing.assert_array_equal(new.key_BTJI[0, :, 0, 0], [0, 1, 1, 0])
    np.testing.assert_array_equal(new.value_BTJI[0, :, 0, 0], [0, 2, 2, 0])
    assert new.key_BTJI.dtype == jnp.bfloat16


def test_dropout_in_training_only():
    sight = row_sight(SEGMENTS_BL)
    plain, dropping = build(), build(rate=0.5)
    np.testing.assert_array_equal(
        run(dropping, X_BLD, POSITIONS_BL, sight)[0], run(plain, X_BLD, POSITIONS_BL, sight)[0]
    )
    y_BLD = np.asarray(run(dropping, X_BLD, POSITIONS_BL, sight, jax.random.key(0))[0])
    assert 0.2 < np.mean(y_BLD == 0) < 0.8


def test_initial_values_are_scaled_by_the_fan_in():
    layer = Attention(jax.random.key(0), AttentionShape(64, 8, 4, 16), DEFAULT)
    for weight, fan_in in ((layer.query_DHI, 64), (layer.key_DJI, 64), (layer.value_DJI, 64), (layer.out_HID, 128)):
        np.testing.assert_allclose(np.std(weight[...]), fan_in**-0.5, rtol=0.05)
