"""Multi-head and grouped-query attention with document boundaries and a key/value cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparse_lm.nn.attend import Sight
from sparse_lm.nn.cache import KeyValues
from sparse_lm.nn.dropout import dropout, split_keys
from sparse_lm.nn.heads import AttentionShape
from sparse_lm.nn.init import fan_in_normal
from sparse_lm.nn.norm import unit_mean_square
from sparse_lm.sharding import Rules


class Attention(nnx.Module):
    """H query heads share J key/value heads (J = H is multi-head, J < H grouped-query: Ainslie et al. 2023).

    What else there may be, such as norms, biases and sinks: see `HeadsConfig`.
    """

    def __init__(self, key: jax.Array, shape: AttentionShape, rules: Rules):
        d_model, num_heads, num_kv_heads, head_dim = shape.d_model, shape.num_heads, shape.kv_heads, shape.head_dim
        query, key_, value, out = jax.random.split(key, 4)
        self.shape, self.rules, options = shape, rules, shape.options
        self.query_DHI = nnx.Param(fan_in_normal(query, (d_model, num_heads, head_dim), d_model))
        self.key_DJI = nnx.Param(fan_in_normal(key_, (d_model, num_kv_heads, head_dim), d_model))
        self.value_DJI = nnx.Param(fan_in_normal(value, (d_model, num_kv_heads, head_dim), d_model))
        self.out_HID = nnx.Param(fan_in_normal(out, (num_heads, head_dim, d_model), num_heads * head_dim))

        def filled(value: int, wanted: bool, *size: int) -> nnx.Param | None:
            return nnx.Param(jnp.full(size, value, jnp.float32)) if wanted else None

        self.query_bias_HI = filled(0, options.qkv_bias, num_heads, head_dim)
        self.key_bias_JI = filled(0, options.qkv_bias, num_kv_heads, head_dim)
        self.value_bias_JI = filled(0, options.qkv_bias, num_kv_heads, head_dim)
        self.out_bias_D = filled(0, options.out_bias, d_model)
        self.sinks_H = filled(0, options.sinks, num_heads)
        self.query_norm_I = filled(1, options.qk_norm == "head", head_dim)
        self.key_norm_I = filled(1, options.qk_norm == "head", head_dim)
        self.query_norm_HI = filled(1, options.qk_norm == "model", num_heads, head_dim)
        self.key_norm_JI = filled(1, options.qk_norm == "model", num_kv_heads, head_dim)

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        positions_BL: Int[Array, "B L"],
        sight: Sight,
        key: jax.Array | None = None,
        cache: tuple[KeyValues, jax.Array] | None = None,
    ) -> tuple[Float[Array, "B L D"], KeyValues | None]:
        """Attends within the row (T = L), or over a cache.

        sight: who sees whom, before what is particular to the layer. key: None is evaluation. cache: the keys and
        values so far, and the index at which those of `x` are written. Returns the result and the cache with `x` in it.
        """
        rules, dtype = self.rules, x_BLD.dtype
        query_BLHI = rules.einsum("BLD,DHI->BLHI", x_BLD, rules.gather(self.query_DHI[...], "DHI", dtype))
        key_BTJI = rules.einsum("BTD,DJI->BTJI", x_BLD, rules.gather(self.key_DJI[...], "DJI", dtype))
        value_BTJI = rules.einsum("BTD,DJI->BTJI", x_BLD, rules.gather(self.value_DJI[...], "DJI", dtype))
        weights_key, out_key = split_keys(key, 2)
        projected = self._adjusted(query_BLHI, key_BTJI, value_BTJI)
        sinks_H = None if self.sinks_H is None else rules.gather(self.sinks_H[...], "H")
        heads = self.shape.heads(rules)
        mixed_BLHI, stored = heads.mix(projected, positions_BL, sight, weights_key, cache, sinks_H)
        y_BLD = rules.einsum("BLHI,HID->BLD", mixed_BLHI, rules.gather(self.out_HID[...], "HID", dtype))
        if self.out_bias_D is not None:
            y_BLD = y_BLD + rules.whole(self.out_bias_D[...], dtype)
        return dropout(y_BLD, self.shape.dropout_rate, out_key), stored

    def _adjusted(self, query_BLHI, key_BTJI, value_BTJI) -> tuple[jax.Array, jax.Array, jax.Array]:
        """With biases, then cut off, then normalised, as far as each is asked for."""
        rules, options, dtype = self.rules, self.shape.options, query_BLHI.dtype
        if self.query_bias_HI is not None and self.key_bias_JI is not None and self.value_bias_JI is not None:
            query_BLHI = query_BLHI + rules.gather(self.query_bias_HI[...], "HI", dtype)
            key_BTJI = key_BTJI + rules.gather(self.key_bias_JI[...], "JI", dtype)
            value_BTJI = value_BTJI + rules.gather(self.value_bias_JI[...], "JI", dtype)
        if options.clip_qkv is not None:
            low, high = -options.clip_qkv, options.clip_qkv
            query_BLHI, key_BTJI, value_BTJI = (jnp.clip(x, low, high) for x in (query_BLHI, key_BTJI, value_BTJI))
        eps = self.shape.eps
        if self.query_norm_I is not None and self.key_norm_I is not None:
            query_BLHI = _normalised(query_BLHI, -1, eps, rules.whole(self.query_norm_I[...]))
            key_BTJI = _normalised(key_BTJI, -1, eps, rules.whole(self.key_norm_I[...]))
        if self.query_norm_HI is not None and self.key_norm_JI is not None:
            query_BLHI = _normalised(query_BLHI, (-2, -1), eps, rules.gather(self.query_norm_HI[...], "HI"))
            key_BTJI = _normalised(key_BTJI, (-2, -1), eps, rules.gather(self.key_norm_JI[...], "JI"))
        if options.qk_norm == "l2" and self.shape.rope_base is not None:
            query_BLHI, key_BTJI = (_normalised(x, -1, eps) for x in (query_BLHI, key_BTJI))
        return query_BLHI, key_BTJI, value_BTJI


def _normalised(x: jax.Array, axes: int | tuple[int, ...], eps: float, scale: jax.Array | None = None) -> jax.Array:
    """RMSNorm over some axes, in float32."""
    y = unit_mean_square(x.astype(jnp.float32), eps, axes)
    return (y if scale is None else y * scale).astype(x.dtype)
