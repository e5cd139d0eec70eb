"""Attention as it is written in papers, with a matrix of all queries and keys: the oracle of the other forms."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_lm.nn.attend.sight import Sight
from sparse_lm.nn.dropout import dropout
from sparse_lm.sharding import Rules


def reference(
    operands: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None],
    sight: Sight,
    scoring: tuple[float, float | None],
    rules: Rules,
    rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B L H W"]:
    """See `attend`. operands: queries, keys, values, sinks. scoring: scale, soft cap. rate: of dropout of weights."""
    query_BLHI, key_BTJI, value_BTJW, sinks_H = operands
    scale, cap = scoring
    batch, length, num_heads, width = query_BLHI.shape
    num_kv_heads = key_BTJI.shape[2]
    # The layout is named, since jax cannot know which of the two axes of H the cut goes to: a single key/value head
    # is the one of all devices.
    shared = num_kv_heads == 1 and num_heads > 1
    letters = ("BL.HI", ".H", "B..I") if shared else ("BLJ.I", "J.", "B.JI")
    shape = (num_kv_heads, num_heads // num_kv_heads)
    # Where devices share a row, each has all of its keys.
    key_BTJI, value_BTJW = (rules.constrain(x, letters[2]) for x in (key_BTJI, value_BTJW))
    sight = dataclasses.replace(
        sight,
        key_segments_BT=rules.constrain(sight.key_segments_BT, "B."),
        key_places_BT=rules.constrain(sight.key_places_BT, "B."),
    )
    query = rules.reshape(query_BLHI, (batch, length, *shape, width), letters[0])
    sums = jnp.promote_types(query.dtype, jnp.float32)
    # Heads before tokens, so that no product has to turn an array of all queries and keys.
    query_BJRLI, key_BJTI, value_BJTW = jnp.moveaxis(query, 1, 3), key_BTJI.swapaxes(1, 2), value_BTJW.swapaxes(1, 2)
    product = functools.partial(jnp.einsum, preferred_element_type=sums)
    scores = product("BJRLI,BJTI->BJRLT", query_BJRLI, key_BJTI) * scale
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    mask = sight.mask()[:, None, None]
    # A finite floor instead of -inf: the rows of padding, which may look nowhere, stay free of NaN.
    scores = jnp.where(mask, scores, jnp.finfo(sums).min)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    if sinks_H is not None:
        sinks = rules.reshape(sinks_H.astype(sums), shape, letters[1])[None, :, :, None, None]
        highest = jnp.maximum(highest, sinks)
    highest = jax.lax.stop_gradient(highest)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks_H is not None:
        total = total + jnp.exp(sinks - highest)
    # Divided by their sum once they are mixed: that is fewer numbers than there are weights.
    weights = dropout(weights, rate, dropout_key).astype(value_BTJW.dtype)
    mixed_BJRLW = (product("BJRLT,BJTW->BJRLW", weights, value_BJTW) / total).astype(value_BTJW.dtype)
    mixed = jnp.moveaxis(mixed_BJRLW, 3, 1)
    mixed_BLHW = rules.reshape(mixed, (batch, length, num_heads, value_BTJW.shape[-1]), "BLHI")
    # A query that sees nothing, such as padding, has equal weights by now.
    return jnp.where(jnp.any(mask, axis=-1)[:, 0, 0, :, None, None], mixed_BLHW, 0)
