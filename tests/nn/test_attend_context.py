"""Rows cut over devices: equal work, pieces that come back where they were, and the same result and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attend_oracle import FEATURES, HEADS, KV_HEADS, VALUE_WIDTH, WIDTH
from jax.sharding import PartitionSpec

from sparse_lm.config import ConfigError
from sparse_lm.nn.attend import Softmax, attend, implementation_of, row_sight
from sparse_lm.nn.attend.chunked import visited
from sparse_lm.nn.attend.context import balanced, exchange, of_pieces
from sparse_lm.sharding import DEFAULT

LENGTH = 16


def test_pieces_cover_the_row_once_and_pair_early_with_late():
    assert balanced(4, 16) == ((0, 7), (1, 6), (2, 5), (3, 4))
    assert balanced(4, 12) == ((0,), (1,), (2,), (3,))  # no eight equal pieces
    assert sorted(piece for own in balanced(8, 64) for piece in own) == list(range(16))


def test_every_device_visits_as_many_blocks():
    sight, size = row_sight(jnp.ones((1, 64), jnp.int32)), 8
    starts = [[piece * size + row for piece in own for row in (0, 4)] for own in balanced(4, 64)]
    turns = [len(visited(own, 64, (4, 4), sight)) for own in starts]
    assert turns == [34] * 4 and sum(turns) == 16 * 17 // 2  # the blocks under the diagonal, each by one device


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_exchange_gives_the_pieces_and_takes_them_back(devices, mesh_of):
    row, pieces = jnp.arange(32)[None], balanced(devices, 32)
    spec = PartitionSpec(None, "context")

    def there(x):
        return exchange(x, pieces)

    def and_back(x):
        return exchange(exchange(x, pieces), pieces, back=True)

    with jax.set_mesh(mesh_of(context=devices)):
        placed = jax.sharding.reshard(row, spec)
        moved, same = (jax.shard_map(f, in_specs=spec, out_specs=spec)(placed) for f in (there, and_back))
    size = 32 // (2 * devices)
    expected = [place for own in pieces for piece in own for place in range(piece * size, (piece + 1) * size)]
    np.testing.assert_array_equal(moved[0], expected)
    np.testing.assert_array_equal(same, row)


def test_the_sight_of_a_device_is_of_its_pieces(mesh_of):
    segments = jnp.asarray([[1] * 5 + [2] * 8 + [0] * 3])
    whole = row_sight(segments).within(6, 4, jnp.asarray([[*range(5), *range(8), 0, 0, 0]]))
    pieces = balanced(2, LENGTH)

    def places(sight):
        own = of_pieces(sight, pieces)
        return own.query_places_BL, own.query_segments_BL, own.floor_BL

    with jax.set_mesh(mesh_of(context=2)):
        # Every device's own arrays, side by side along the row.
        spec = PartitionSpec(None, "context")
        found = jax.shard_map(places, in_specs=PartitionSpec(), out_specs=(spec, spec, spec))(whole)
    order = [*range(4), *range(12, 16), *range(4, 12)]
    for one, all_of_it in zip(found, (jnp.arange(LENGTH)[None], segments, whole.floor_BL), strict=True):
        np.testing.assert_array_equal(np.asarray(one)[0], np.asarray(all_of_it)[0][order])


def given(kv_heads: int, length: int):
    shapes = {
        "query": (2, length, HEADS, WIDTH),
        "key": (2, length, kv_heads, WIDTH),
        "value": (2, length, kv_heads, VALUE_WIDTH),
        "sinks": (HEADS,),
    }
    rng = np.random.default_rng(1)
    arrays = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    segments = np.ones((2, length), np.int32)
    segments[0, 5:], segments[1, length - 3 :] = 2, 0
    positions = np.tile(np.arange(length), (2, 1))
    positions[0, 5:] -= 5
    return arrays, jnp.asarray(segments), jnp.asarray(positions)


def gradients(implementation, arrays, segments, positions, features, block):
    """Result and gradients."""

    def value(arrays):
        sight = row_sight(segments).within(features.window, features.chunk, positions)
        softmax = Softmax(implementation, features.scale, features.soft_cap, block=block)
        query, key, value = (
            DEFAULT.constrain(arrays[name], letters)
            for name, letters in (("query", "BLHI"), ("key", "BTJI"), ("value", "BTJI"))
        )
        sinks = DEFAULT.constrain(arrays["sinks"], "H") if features.sinks else None
        mixed = attend(query, key, value, sight, softmax, DEFAULT, sinks)
        return jnp.sum(mixed**2), mixed

    return jax.jit(jax.grad(value, has_aux=True))(arrays)


@pytest.mark.parametrize(
    ("implementation", "feature", "length", "block", "sizes"),
    [
        ("chunked", "all", 16, 4, {"context": 4, "model": 2}),
        ("chunked", "causal", 16, 2, {"data": 2, "context": 2}),
        ("chunked", "window", 16, 2, {"context": 4}),  # devices with fewer pairs take turns that count for nothing
        ("chunked", "all", 12, 4, {"context": 4}),  # one piece per device, in order
        ("chunked", "causal", 15, 4, {"context": 2}),  # a length that is not cut at all, which the reference does
        ("reference", "all", 16, 4, {"context": 4, "model": 2}),
    ],
)
def test_the_same_with_rows_cut(implementation, feature, length, block, sizes, mesh_of):
    arrays, segments, positions = given(KV_HEADS, length)
    features = FEATURES[feature]
    expected = gradients("reference", arrays, segments, positions, features, block)
    with jax.set_mesh(mesh_of(**sizes)):
        found = gradients(implementation, arrays, segments, positions, features, block)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-4, atol=1e-5)


def test_kernels_want_whole_rows(monkeypatch):
    sight = row_sight(jnp.ones((1, 8), jnp.int32))
    assert implementation_of(Softmax(), sight, (4096, 4096, 64, 64), False, devices=4) == "chunked"
    with pytest.raises(ConfigError, match=r"mesh.context=4: splash attention wants whole rows"):
        implementation_of(Softmax("splash"), sight, (4096, 4096, 64, 64), False, devices=4)
