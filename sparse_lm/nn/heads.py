"""What is between the projections of an attention: rotation, the cache, who sees whom, and softmax."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Float, Int

from sparse_lm.nn.attend import Sight, Softmax, attend
from sparse_lm.nn.cache import AttentionCache, KeyValues, empty_key_values, empty_latents
from sparse_lm.nn.config import HeadsConfig
from sparse_lm.nn.position import rotary
from sparse_lm.nn.remat import named
from sparse_lm.sharding import Rules


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """What a layer's attention is built from.

    num_heads: query heads of a token. kv_heads: heads of keys and values. head_dim: width of each. rope_base: None is
    no rotation. dropout_rate: of the attention weights and of the result. options: of all layers. window, chunk: what
    this layer's queries see of the row, see `HeadsConfig`. eps: of norms inside.
    """

    d_model: int
    num_heads: int
    kv_heads: int
    head_dim: int
    rope_base: float | None = None
    dropout_rate: float = 0.0
    options: HeadsConfig = HeadsConfig()
    window: int | None = None
    chunk: int | None = None
    eps: float = 1e-6

    @property
    def softmax(self) -> Softmax:
        """How scores become weights."""
        options, scaling = self.options, self.options.rope_scaling
        latent = options.latent
        scale = options.scale or (self.head_dim + (latent.rope_dim if latent else 0)) ** -0.5
        if scaling is not None:
            scale *= scaling.score_factor
        return Softmax(options.implementation, scale, options.soft_cap, self.dropout_rate, options.block)

    def empty_cache(self, rows: tuple[int, int, int], dtype, rules: Rules) -> AttentionCache:
        """Room for what tokens leave. rows: layers, sequences, places."""
        latent = self.options.latent
        if latent is not None:
            return empty_latents(rows, (latent.kv_rank, latent.rope_dim), dtype, rules)
        return empty_key_values(rows, (self.kv_heads, self.head_dim), dtype, rules)

    def heads(self, rules: Rules) -> Heads:
        """What is between the projections."""
        return Heads(self, rules)


@dataclasses.dataclass(frozen=True)
class Heads:
    """What is between the projections of a layer's attention, the same for the ordinary one and those with experts."""

    shape: AttentionShape
    rules: Rules

    def mix(
        self,
        projected: tuple[jax.Array, jax.Array, jax.Array],
        positions_BL: Int[Array, "B L"],
        sight: Sight,
        key: jax.Array | None,
        cache: tuple[KeyValues, jax.Array] | None,
        sinks_H: Float[Array, "H"] | None = None,
    ) -> tuple[Float[Array, "B L H I"], KeyValues | None]:
        """What the heads see, and the cache with this pass in it; see `Attention`.

        projected: queries [B, L, H, I], keys and values [B, L, J, I], before rotation.
        """
        query_BLHI, key_BTJI, value_BTJI = named(projected, "qkv")
        dtype = query_BLHI.dtype
        query_BLHI, key_BTJI = (self.rotate(x, positions_BL) for x in (query_BLHI, key_BTJI))
        stored = None
        if cache is not None:
            stored = cache[0].write(key_BTJI, value_BTJI, cache[1])
            key_BTJI, value_BTJI = stored.key_BTJI.astype(dtype), stored.value_BTJI.astype(dtype)
        mixed_BLHI = self.attend((query_BLHI, key_BTJI, value_BTJI), positions_BL, sight, sinks_H, key)
        return mixed_BLHI, stored

    def rotate(self, x_BLHI: Float[Array, "B L H I"], positions_BL: Int[Array, "B L"]) -> Float[Array, "B L H I"]:
        """Queries or keys, turned by their positions where this layer does that."""
        base = self.shape.rope_base
        return x_BLHI if base is None else rotary(x_BLHI, positions_BL, base, self.shape.options.rope_scaling)

    def attend(
        self,
        operands: tuple[jax.Array, jax.Array, jax.Array],
        positions_BL: Int[Array, "B L"],
        sight: Sight,
        sinks_H: Float[Array, "H"] | None,
        key: jax.Array | None,
    ) -> Float[Array, "B L H W"]:
        """Softmax attention within this layer's window and chunk. operands: queries, keys, values."""
        sight = sight.within(self.shape.window, self.shape.chunk, positions_BL)
        mixed_BLHW = attend(*operands, sight, self.shape.softmax, self.rules, sinks_H, key)
        return named(mixed_BLHW, "attention")
