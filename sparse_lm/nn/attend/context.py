"""Attention of rows that are cut over devices along L: which part of a row a device's queries are, with equal work.

Keys and values are whole on every device; queries are not. Under a causal mask the last queries of a row see most, so
that equal parts in order would leave the first device idle. A row is cut into 2n parts and device d attends for parts d
and 2n - 1 - d, which see 2n + 1 parts together whatever d is (as Llama 3 is trained, 2407.21783, section 3.3.2).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sparse_lm.nn.attend.sight import Sight

AXIS = "context"
Pieces = tuple[tuple[int, ...], ...]  # by device, which of the equal pieces of a row its queries are
WHOLE: Pieces = ((0,),)


def balanced(devices: int, length: int) -> Pieces:
    """Two of 2n pieces for each of n devices; one each, in order, where a row cannot be cut so."""
    if length % (2 * devices):
        return tuple((d,) for d in range(devices))
    return tuple((d, 2 * devices - 1 - d) for d in range(devices))


def exchange(x_BL: jax.Array, pieces: Pieces, back: bool = False) -> jax.Array:
    """A device's part of the row, [B, L / n, ...] in order, against the pieces that `balanced` gives it, or back.

    For use inside a `shard_map`. Two permutations, each of half of what a device has.
    """
    if len(pieces[0]) == 1:
        return x_BL
    devices, owner = len(pieces), {piece: d for d, own in enumerate(pieces) for piece in own}
    even, odd = ([(d, owner[2 * d + which]) for d in range(devices)] for which in (0, 1))
    # Of its two pieces a device with an even number has the even one first, the others second.
    first_is_even = jax.lax.axis_index(AXIS) % 2 == 0
    one, two = jnp.split(x_BL, 2, axis=1)
    if back:
        one, two = jnp.where(first_is_even, one, two), jnp.where(first_is_even, two, one)
        even, odd = ([(to, source) for source, to in moves] for moves in (even, odd))
    one, two = jax.lax.ppermute(one, AXIS, even), jax.lax.ppermute(two, AXIS, odd)
    if not back:
        one, two = jnp.where(first_is_even, one, two), jnp.where(first_is_even, two, one)
    return jnp.concatenate([one, two], axis=1)


def of_pieces(sight: Sight, pieces: Pieces) -> Sight:
    """The sight of a device's own queries, from that of all queries of the row. For use inside a `shard_map`."""
    size = sight.query_segments_BL.shape[1] // sum(map(len, pieces))
    mine = jnp.asarray(pieces)[jax.lax.axis_index(AXIS)] * size

    def cut(x_BL):
        parts = [jax.lax.dynamic_slice_in_dim(x_BL, mine[i], size, axis=1) for i in range(len(pieces[0]))]
        return jnp.concatenate(parts, axis=1)

    floor_BL = None if sight.floor_BL is None else cut(sight.floor_BL)
    own = {"query_segments_BL": cut(sight.query_segments_BL), "query_places_BL": cut(sight.query_places_BL)}
    return dataclasses.replace(sight, floor_BL=floor_BL, **own)
