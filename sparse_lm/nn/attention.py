"""Multi-head and grouped-query attention with document boundaries and a key/value cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Scalar

from sparse_lm.nn.dropout import dropout, split_keys
from sparse_lm.nn.init import fan_in_normal
from sparse_lm.nn.position import rotary
from sparse_lm.nn.remat import named
from sparse_lm.sharding import Rules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Keys and values of the tokens seen so far, in rows of fixed length T; what is not yet written is masked out."""

    key_BTJI: Float[Array, "*N B T J I"]
    value_BTJI: Float[Array, "*N B T J I"]

    def write(self, key_BLJI: jax.Array, value_BLJI: jax.Array, start: jax.Array) -> KeyValues:
        """A copy with the new keys and values at `start` and after."""
        update = jax.lax.dynamic_update_slice_in_dim
        return KeyValues(
            update(self.key_BTJI, key_BLJI.astype(self.key_BTJI.dtype), start, axis=1),
            update(self.value_BTJI, value_BLJI.astype(self.value_BTJI.dtype), start, axis=1),
        )


def causal_mask(
    query_segments_BL: Int[Array, "B L"], key_segments_BT: Int[Array, "B T"], start: int | Scalar = 0
) -> Bool[Array, "B L T"]:
    """True where a query may look: not later than itself, and within its own document; padding (segment 0) nowhere.

    start: index in the row of the first query, when the queries continue a cache.
    """
    same = query_segments_BL[:, :, None] == key_segments_BT[:, None, :]
    length, keys = query_segments_BL.shape[1], key_segments_BT.shape[1]
    earlier = jnp.arange(keys)[None, :] <= jnp.arange(length)[:, None] + start
    return same & earlier & (key_segments_BT[:, None, :] > 0)


class Attention(nnx.Module):
    """H query heads share J key/value heads (J = H is multi-head, J < H grouped-query: Ainslie et al. 2023)."""

    def __init__(
        self,
        key: jax.Array,
        d_model: int,
        heads: tuple[int, int, int],
        rules: Rules,
        rope_base: float | None,
        dropout_rate: float = 0.0,
    ):
        """heads: (query heads, key/value heads, width of a head). rope_base: None is no rotation."""
        num_heads, num_kv_heads, head_dim = heads
        query, key_, value, out = jax.random.split(key, 4)
        self.rules, self.rope_base, self.dropout_rate = rules, rope_base, dropout_rate
        self.query_DHI = nnx.Param(fan_in_normal(query, (d_model, num_heads, head_dim), d_model))
        self.key_DJI = nnx.Param(fan_in_normal(key_, (d_model, num_kv_heads, head_dim), d_model))
        self.value_DJI = nnx.Param(fan_in_normal(value, (d_model, num_kv_heads, head_dim), d_model))
        self.out_HID = nnx.Param(fan_in_normal(out, (num_heads, head_dim, d_model), num_heads * head_dim))

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        positions_BL: Int[Array, "B L"],
        mask_BLT: Bool[Array, "B L T"],
        key: jax.Array | None = None,
        cache: tuple[KeyValues, jax.Array] | None = None,
    ) -> tuple[Float[Array, "B L D"], KeyValues | None]:
        """Attends within the row (T = L), or over a cache.

        mask_BLT: see `causal_mask`. key: None is evaluation. cache: the keys and values so far, and the index at
        which those of `x` are written. Returns the result and the cache with `x` in it.
        """
        rules, dtype = self.rules, x_BLD.dtype
        query_BLHI = rules.einsum("BLD,DHI->BLHI", x_BLD, rules.gather(self.query_DHI[...], "DHI", dtype))
        key_BTJI = rules.einsum("BTD,DJI->BTJI", x_BLD, rules.gather(self.key_DJI[...], "DJI", dtype))
        value_BTJI = rules.einsum("BTD,DJI->BTJI", x_BLD, rules.gather(self.value_DJI[...], "DJI", dtype))
        weights_key, out_key = split_keys(key, 2)
        projected, heads = (query_BLHI, key_BTJI, value_BTJI), Heads(rules, self.rope_base, self.dropout_rate)
        mixed_BLHI, stored = heads.mix(projected, positions_BL, mask_BLT, weights_key, cache)
        y_BLD = rules.einsum("BLHI,HID->BLD", mixed_BLHI, rules.gather(self.out_HID[...], "HID", dtype))
        return dropout(y_BLD, self.dropout_rate, out_key), stored


@dataclasses.dataclass(frozen=True)
class Heads:
    """What is between the projections of an attention. rope_base: None is no rotation. rate: of dropout of weights."""

    rules: Rules
    rope_base: float | None
    rate: float

    def mix(
        self,
        projected: tuple[jax.Array, jax.Array, jax.Array],
        positions_BL: Int[Array, "B L"],
        mask_BLT: Bool[Array, "B L T"],
        key: jax.Array | None,
        cache: tuple[KeyValues, jax.Array] | None,
    ) -> tuple[Float[Array, "B L H I"], KeyValues | None]:
        """What the heads see, and the cache with this pass in it; see `Attention`.

        projected: queries [B, L, H, I], keys and values [B, L, J, I], before rotation.
        """
        query_BLHI, key_BTJI, value_BTJI = named(projected, "qkv")
        dtype = query_BLHI.dtype
        if self.rope_base is not None:
            query_BLHI = rotary(query_BLHI, positions_BL, self.rope_base)
            key_BTJI = rotary(key_BTJI, positions_BL, self.rope_base)
        stored = None
        if cache is not None:
            stored = cache[0].write(key_BTJI, value_BTJI, cache[1])
            key_BTJI, value_BTJI = stored.key_BTJI.astype(dtype), stored.value_BTJI.astype(dtype)
        mixed_BLHI = attend(query_BLHI, key_BTJI, value_BTJI, mask_BLT, self.rules, self.rate, key)
        return named(mixed_BLHI, "attention"), stored


def attend(
    query_BLHI: Float[Array, "B L H I"],
    key_BTJI: Float[Array, "B T J I"],
    value_BTJI: Float[Array, "B T J I"],
    mask_BLT: Bool[Array, "B L T"],
    rules: Rules,
    rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B L H I"]:
    """Softmax attention of H heads over J: head h looks at key/value head h // (H / J). rate: of dropout of weights."""
    batch, length, num_heads, width = query_BLHI.shape
    num_kv_heads = key_BTJI.shape[2]
    # The layout is named, since jax cannot know which of the two axes of H the cut goes to.
    shape = (batch, length, num_kv_heads, num_heads // num_kv_heads, width)
    query = rules.reshape(query_BLHI, shape, "BLJ.I")
    scores = jnp.einsum("BLJRI,BTJI->BJRLT", query, key_BTJI, preferred_element_type=jnp.float32) * width**-0.5
    # A finite floor instead of -inf: the rows of padding, which may look nowhere, stay free of NaN.
    scores = jnp.where(mask_BLT[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores, axis=-1), rate, dropout_key).astype(value_BTJI.dtype)
    mixed = jnp.einsum("BJRLT,BTJI->BLJRI", weights, value_BTJI)
    return rules.reshape(mixed, (batch, length, num_heads, width), "BLHI")
