"""Multi-head latent attention: keys and values of all heads are made from a few numbers per token (DeepSeek-V2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparse_lm.nn.attend import Sight
from sparse_lm.nn.cache import LatentKeys
from sparse_lm.nn.dropout import dropout, split_keys
from sparse_lm.nn.heads import AttentionShape
from sparse_lm.nn.init import fan_in_normal
from sparse_lm.nn.norm import Norm
from sparse_lm.nn.remat import named
from sparse_lm.sharding import Rules


class LatentAttention(nnx.Module):
    """A head's query and key have I numbers that are not rotated and A that are; its value has W (2405.04434, 2.1).

    With a cache, keys and values are not made: a query meets the latents themselves, having passed the keys' matrix
    backwards, and what is seen of the latents passes the values' matrix, which is the same in another order.
    """

    def __init__(self, key: jax.Array, shape: AttentionShape, rules: Rules):
        assert shape.options.latent is not None
        self.shape, self.rules, self.options = shape, rules, shape.options.latent
        d_model, heads, width, options = shape.d_model, shape.num_heads, shape.head_dim, self.options
        rank, rotated, value_dim = options.kv_rank, options.rope_dim, options.value_dim or width
        down, up, latent, rope, key_up, value_up, out = jax.random.split(key, 7)
        size, both = options.query_rank, (heads, width + rotated)
        self.query_DHI = nnx.Param(fan_in_normal(up, (d_model, *both), d_model)) if size is None else None
        self.query_down_DQ = nnx.Param(fan_in_normal(down, (d_model, size), d_model)) if size else None
        self.query_norm = Norm("rmsnorm", size, rules, shape.eps) if size else None
        self.query_up_QHI = nnx.Param(fan_in_normal(up, (size, *both), size)) if size else None
        self.latent_DP = nnx.Param(fan_in_normal(latent, (d_model, rank), d_model))
        self.latent_norm = Norm("rmsnorm", rank, rules, shape.eps)
        self.rope_key_DA = nnx.Param(fan_in_normal(rope, (d_model, rotated), d_model))
        self.key_up_PHI = nnx.Param(fan_in_normal(key_up, (rank, heads, width), rank))
        self.value_up_PHW = nnx.Param(fan_in_normal(value_up, (rank, heads, value_dim), rank))
        self.out_HWD = nnx.Param(fan_in_normal(out, (heads, value_dim, d_model), heads * value_dim))
        self.sinks_H = nnx.Param(jnp.zeros((heads,), jnp.float32)) if shape.options.sinks else None
        self.out_bias_D = nnx.Param(jnp.zeros((d_model,), jnp.float32)) if shape.options.out_bias else None

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        positions_BL: Int[Array, "B L"],
        sight: Sight,
        key: jax.Array | None = None,
        cache: tuple[LatentKeys, jax.Array] | None = None,
    ) -> tuple[Float[Array, "B L D"], LatentKeys | None]:
        """See `nn.attention.Attention`."""
        rules, dtype, heads = self.rules, x_BLD.dtype, self.shape.heads(self.rules)
        weights_key, out_key = split_keys(key, 2)
        query_BLHI = self._queries(x_BLD)
        latent_BTP = rules.einsum("BTD,DP->BTP", x_BLD, rules.gather(self.latent_DP[...], "DP", dtype))
        rope_key_BTA = rules.einsum("BTD,DA->BTA", x_BLD, rules.gather(self.rope_key_DA[...], "DA", dtype))
        query_BLHI, latent_BTP, rope_key_BTA = named((query_BLHI, latent_BTP, rope_key_BTA), "qkv")
        latent_BTP = self.latent_norm(latent_BTP)
        rope_key_BTA = heads.rotate(rope_key_BTA[:, :, None], positions_BL)[:, :, 0]
        query_BLHI, query_BLHA = jnp.split(query_BLHI, [self.shape.head_dim], axis=-1)
        query_BLHA = heads.rotate(query_BLHA, positions_BL)
        key_up_PHI = rules.gather(self.key_up_PHI[...], "PHI", dtype)
        value_up_PHW = rules.gather(self.value_up_PHW[...], "PHW", dtype)
        sinks_H = None if self.sinks_H is None else rules.gather(self.sinks_H[...], "H")
        stored = None
        if cache is None:
            key_BTHI = rules.einsum("BTP,PHI->BTHI", latent_BTP, key_up_PHI)
            value_BTHW = rules.einsum("BTP,PHW->BTHW", latent_BTP, value_up_PHW)
            shared_BTHA = jnp.broadcast_to(rope_key_BTA[:, :, None], (*key_BTHI.shape[:3], rope_key_BTA.shape[-1]))
            shared_BTHA = rules.constrain(shared_BTHA, "BTHA")
            operands = (_joined(query_BLHI, query_BLHA), _joined(key_BTHI, shared_BTHA), value_BTHW)
            mixed_BLHW = heads.attend(operands, positions_BL, sight, sinks_H, weights_key)
        else:
            stored = cache[0].write(latent_BTP, rope_key_BTA, cache[1])
            latent_BTP, rope_key_BTA = stored.latent_BTP.astype(dtype), stored.rope_key_BTA.astype(dtype)
            query_BLHP = rules.einsum("BLHI,PHI->BLHP", query_BLHI, key_up_PHI)
            latent = latent_BTP[:, :, None]
            operands = (_joined(query_BLHP, query_BLHA), _joined(latent, rope_key_BTA[:, :, None]), latent)
            mixed_BLHP = heads.attend(operands, positions_BL, sight, sinks_H, weights_key)
            mixed_BLHW = rules.einsum("BLHP,PHW->BLHW", mixed_BLHP, value_up_PHW)
        y_BLD = rules.einsum("BLHW,HWD->BLD", mixed_BLHW, rules.gather(self.out_HWD[...], "HWD", dtype))
        if self.out_bias_D is not None:
            y_BLD = y_BLD + rules.whole(self.out_bias_D[...], dtype)
        return dropout(y_BLD, self.shape.dropout_rate, out_key), stored

    def _queries(self, x_BLD: jax.Array) -> jax.Array:
        """[B, L, H, I + A], before rotation."""
        rules, dtype = self.rules, x_BLD.dtype
        if self.query_DHI is not None:
            return rules.einsum("BLD,DHI->BLHI", x_BLD, rules.gather(self.query_DHI[...], "DHI", dtype))
        assert self.query_down_DQ is not None and self.query_norm is not None and self.query_up_QHI is not None
        down_BLQ = rules.einsum("BLD,DQ->BLQ", x_BLD, rules.gather(self.query_down_DQ[...], "DQ", dtype))
        up_QHI = rules.gather(self.query_up_QHI[...], "QHI", dtype)
        return rules.einsum("BLQ,QHI->BLHI", self.query_norm(down_BLQ), up_QHI)


def _joined(*parts: jax.Array) -> jax.Array:
    return jnp.concatenate(parts, axis=-1)
