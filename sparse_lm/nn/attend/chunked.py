"""Exact attention by blocks of queries and keys: no array is as large as length times length.

A softmax over keys is summed block by block around the highest score so far (Milakov & Gimelshein 2018, 1805.02867);
the backward pass computes the scores of a block again from the logarithm of the sum (Rabe & Staats 2021, 2112.05682;
Dao et al. 2022, 2205.14135). Pairs of blocks in which no query sees a key, by order and reach, are not visited: they
are known before compilation, so that one loop of a fixed number of turns runs over the others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparse_lm.mesh import varying
from sparse_lm.nn.attend.context import AXIS, WHOLE, Pieces
from sparse_lm.nn.attend.sight import Sight

Operands = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]
Scoring = tuple[float, float | None]


def chunked(
    operands: Operands, sight: Sight, scoring: Scoring, block: int, pieces: Pieces = WHOLE
) -> Float[Array, "B L H W"]:
    """See `attend`; for plain local arrays. block: tokens per block. operands, scoring: see `reference`.

    pieces: which parts of a row the queries of each device along `context` are.
    """
    query_BLHI, key_BTJI, value_BTJW, sinks_H = operands
    batch, length, num_heads, width = query_BLHI.shape
    heads, keys = key_BTJI.shape[2], key_BTJI.shape[1]
    rows, columns = _rows(length // len(pieces[0]), block, len(pieces) > 1), min(block, keys)
    query = _blocks(query_BLHI.reshape(batch, length, heads, num_heads // heads, width), rows)
    key, value = _blocks(key_BTJI, columns), _blocks(value_BTJW, columns)
    sinks = None if sinks_H is None else sinks_H.reshape(heads, num_heads // heads)
    pairs = _pairs(pieces, (length, keys), (rows, columns), sight)
    blocked = _blocked(sight, rows, columns)
    mixed: jax.Array = _attend((query, key, value, sinks), blocked, pairs, scoring)  # type: ignore  # [blocks, B, J, R, rows, W]
    mixed = jnp.moveaxis(mixed, 0, 3).reshape(batch, num_heads, -1, value_BTJW.shape[-1])[:, :, :length]
    return jnp.swapaxes(mixed, 1, 2).astype(query_BLHI.dtype)


def visited(starts: Sequence[int], keys: int, blocks: tuple[int, int], sight: Sight) -> list[tuple[int, int]]:
    """The pairs of a block of queries and one of keys in which a query may see a key: numbers of both.

    starts: the place in the row of the first query of each block. blocks: queries and keys of a block.
    """
    rows, columns = blocks
    pairs = []
    for i, start in enumerate(starts):
        for j in range(-(-keys // columns)):
            # Between tokens that are some of a row there are fewer others than places, so that reach holds there too.
            after = j * columns > start + rows - 1
            before = sight.reach is not None and (j + 1) * columns - 1 <= start - sight.reach
            if sight.layout == "cache" or not (after or before):
                pairs.append((i, j))
    return pairs


def _rows(piece: int, block: int, exact: bool) -> int:
    """Queries of a block: as many as asked for, or the most below that divide the piece."""
    return max(n for n in range(1, min(block, piece) + 1) if piece % n == 0) if exact else min(block, piece)


def _pairs(pieces: Pieces, lengths: tuple[int, int], blocks: tuple[int, int], sight: Sight):
    """This device's pairs, and which of them count: all devices take as many turns as the one with most."""
    (length, keys), rows = lengths, blocks[0]
    size = length // len(pieces[0])
    starts = [[piece * size + row for piece in own for row in range(0, size, rows)] for own in pieces]
    lists = [visited(own, keys, blocks, sight) for own in starts]
    most = max(map(len, lists))
    table = np.asarray([[*pairs, *[(0, 0)] * (most - len(pairs))] for pairs in lists], np.int32)
    counts = np.asarray([len(pairs) for pairs in lists])
    here = jax.lax.axis_index(AXIS) if len(pieces) > 1 else 0
    mine = jnp.asarray(table)[here]
    return mine[:, 0], mine[:, 1], jnp.arange(most) < jnp.asarray(counts)[here]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(operands, sight, pairs, scoring):
    return _forward(operands, sight, pairs, scoring)[0]


def _forward(operands, sight, pairs, scoring):
    query, key, value, sinks = operands
    number, batch, rows, heads, group, _ = query.shape
    sums = jnp.promote_types(query.dtype, jnp.float32)
    floor = jnp.finfo(sums).min / 2

    def turn(carry, pair):
        mixed, highest, total = carry
        i, j, counts = pair
        scores, mask, _ = _scores(query[i], key[j], _pair(sight, i, j), scoring, counts)
        before = highest[i]
        new = jnp.maximum(before, jnp.max(jnp.where(mask, scores, floor), axis=-1))
        weights = jnp.where(mask, jnp.exp(scores - new[..., None]), 0)
        shrink = jnp.exp(before - new)
        summed = jnp.einsum("BJRLT,BTJW->BJRLW", weights.astype(value.dtype), value[j], preferred_element_type=sums)
        mixed = _put(mixed, i, mixed[i] * shrink[..., None] + summed)
        total = _put(total, i, total[i] * shrink + jnp.sum(weights, axis=-1))
        return (mixed, _put(highest, i, new), total), None

    shape = (number, batch, heads, group, rows)
    start = floor if sinks is None else sinks.astype(sums)[:, :, None]
    highest = varying(jnp.broadcast_to(start, shape))
    total = varying(jnp.full(shape, 0.0 if sinks is None else 1.0, sums))
    mixed = varying(jnp.zeros((*shape, value.shape[-1]), sums))
    (mixed, highest, total), _ = jax.lax.scan(turn, (mixed, highest, total), pairs)
    mixed = mixed / jnp.where(total > 0, total, 1)[..., None]
    log_total = highest + jnp.log(jnp.where(total > 0, total, 1))
    mixed = mixed.astype(query.dtype)
    return mixed, (operands, sight, pairs, mixed, log_total)


def _backward(scoring, residuals, d_mixed):
    (query, key, value, sinks), sight, pairs, mixed, log_total = residuals
    sums, scale = log_total.dtype, scoring[0]
    slope = jnp.sum(d_mixed.astype(sums) * mixed.astype(sums), axis=-1)

    def turn(carry, pair):
        d_query, d_key, d_value = carry
        i, j, counts = pair
        scores, mask, capped = _scores(query[i], key[j], _pair(sight, i, j), scoring, counts)
        weights = jnp.where(mask, jnp.exp(scores - log_total[i][..., None]), 0)
        outer = d_mixed[i]
        product = functools.partial(jnp.einsum, preferred_element_type=sums)
        d_value = _put(d_value, j, d_value[j] + product("BJRLT,BJRLW->BTJW", weights.astype(outer.dtype), outer))
        d_weights = product("BJRLW,BTJW->BJRLT", outer, value[j])
        d_scores = weights * (d_weights - slope[i][..., None]) * scale
        if capped is not None:
            d_scores = d_scores * (1 - capped**2)
        d_scores = d_scores.astype(query.dtype)
        d_query = _put(d_query, i, d_query[i] + product("BJRLT,BTJI->BLJRI", d_scores, key[j]))
        d_key = _put(d_key, j, d_key[j] + product("BJRLT,BLJRI->BTJI", d_scores, query[i]))
        return (d_query, d_key, d_value), None

    start = tuple(varying(jnp.zeros(operand.shape, sums)) for operand in (query, key, value))
    grads, _ = jax.lax.scan(turn, start, pairs)
    d_query, d_key, d_value = (
        grad.astype(operand.dtype) for grad, operand in zip(grads, (query, key, value), strict=True)
    )
    d_sinks = None
    if sinks is not None:
        share = jnp.exp(sinks.astype(sums)[:, :, None] - log_total)
        d_sinks = -jnp.sum(share * slope, axis=(0, 1, 4)).astype(sinks.dtype)
    return (d_query, d_key, d_value, d_sinks), None, None


_attend.defvjp(_forward, _backward)


def _scores(query, key, sight: Sight, scoring: Scoring, counts):
    """Scores of a pair of blocks, where a query sees a key, and the hyperbolic tangent under a soft cap."""
    scale, cap = scoring
    sums = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("BLJRI,BTJI->BJRLT", query, key, preferred_element_type=sums) * scale
    capped = None
    if cap is not None:
        capped = jnp.tanh(scores / cap)
        scores = cap * capped
    return scores, (sight.mask() & counts)[:, None, None], capped


def _put(whole, i, part):
    return jax.lax.dynamic_update_index_in_dim(whole, part, i, 0)


def _blocks(x_BL: jax.Array, size: int) -> jax.Array:
    """[B, L, ...] -> [blocks, B, size, ...], filled up with zeros."""
    spare = -x_BL.shape[1] % size
    x_BL = jnp.pad(x_BL, [(0, 0), (0, spare), *[(0, 0)] * (x_BL.ndim - 2)])
    return jnp.swapaxes(x_BL.reshape(x_BL.shape[0], -1, size, *x_BL.shape[2:]), 0, 1)


def _blocked(sight: Sight, rows: int, columns: int) -> Sight:
    """The sight with every array cut into blocks; what fills them up is padding."""
    query_segments, query_places = (_blocks(x, rows) for x in (sight.query_segments_BL, sight.query_places_BL))
    key_segments, key_places = (_blocks(x, columns) for x in (sight.key_segments_BT, sight.key_places_BT))
    floor = None if sight.floor_BL is None else _blocks(sight.floor_BL, rows)
    return Sight(query_segments, key_segments, query_places, key_places, floor, sight.window, sight.reach, sight.layout)


def _pair(sight: Sight, i, j) -> Sight:
    floor = None if sight.floor_BL is None else sight.floor_BL[i]
    return Sight(
        sight.query_segments_BL[i],
        sight.key_segments_BT[j],
        sight.query_places_BL[i],
        sight.key_places_BT[j],
        floor,
        sight.window,
    )
