"""One Transformer layer: attention and a feed-forward part that is dense or sparse."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparse_lm.models.config import ModelConfig
from sparse_lm.models.reports import Reports
from sparse_lm.moe.attention import AttentionInputs, ExpertAttention
from sparse_lm.moe.layer import MoE
from sparse_lm.moe.types import Replay
from sparse_lm.nn.attention import Attention, KeyValues
from sparse_lm.nn.dropout import split_keys
from sparse_lm.nn.mlp import Mlp
from sparse_lm.nn.norm import Norm
from sparse_lm.sharding import Rules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of a forward pass sees beside the activations.

    ids_BL: token ids. positions_BL, mask_BLT: see `Attention`. real_BL: False is padding. start: index in the cache of
    the first token, or None without a cache. previous_BL: id of the token before in the same document, -1 where there
    is none; None is -1 everywhere. replay: see `moe.types.Replay`, of this layer, or of all stacked in a whole model.
    carried_BLE: what the sparse layer before handed on to the router; None where routers ask for nothing.
    """

    ids_BL: Int[Array, "B L"]
    positions_BL: Int[Array, "B L"]
    mask_BLT: Bool[Array, "B L T"]
    real_BL: Bool[Array, "B L"]
    start: jax.Array | None = None
    previous_BL: Int[Array, "B L"] | None = None
    replay: Replay | None = None
    carried_BLE: Float[Array, "B L E"] | None = None


class Block(nnx.Module):
    """x + attention, then x + feed-forward, normalised before (`pre`) or after (`post`)."""

    def __init__(self, key: jax.Array, config: ModelConfig, sparse: bool, rules: Rules):
        attention, feed_forward = jax.random.split(key)
        self.config = config
        self.attention = _attention(attention, config, rules)
        if sparse:
            assert config.moe is not None
            self.feed_forward: MoE | Mlp = MoE(
                feed_forward, config.d_model, config.d_expert, config.activation, config.moe, rules
            )
        else:
            self.feed_forward = Mlp(feed_forward, config.d_model, config.d_ff, config.activation, rules, config.dropout)
        self.attention_norm = Norm(config.norm, config.d_model, rules)
        self.feed_forward_norm = Norm(config.norm, config.d_model, rules)

    def __call__(
        self, x_BLD: Float[Array, "B L D"], context: Context, key: jax.Array | None, cache: KeyValues | None = None
    ) -> tuple[Float[Array, "B L D"], Reports, KeyValues | None]:
        """The layer's output, its reports and its cache with this pass in it."""
        pre = self.config.norm_position == "pre"
        attention_key, feed_forward_key = split_keys(key, 2)
        stored = None if cache is None or context.start is None else (cache, context.start)

        inputs = self.attention_norm(x_BLD) if pre else x_BLD
        attention_stats = None
        if isinstance(self.attention, ExpertAttention):
            record = context.replay is not None and context.replay.record
            where = (context.positions_BL, context.mask_BLT, context.real_BL)
            seen = AttentionInputs(*where, context.ids_BL, context.previous_BL, record)
            y_BLD, cache, attention_stats = self.attention(inputs, seen, attention_key, stored)
        else:
            y_BLD, cache = self.attention(inputs, context.positions_BL, context.mask_BLT, attention_key, stored)
        x_BLD = x_BLD + y_BLD if pre else self.attention_norm(x_BLD + y_BLD)

        inputs = self.feed_forward_norm(x_BLD) if pre else x_BLD
        stats = None
        if isinstance(self.feed_forward, MoE):
            beside = (context.ids_BL, context.previous_BL, context.replay, context.carried_BLE)
            y_BLD, stats = self.feed_forward(inputs, context.real_BL, feed_forward_key, *beside)
        else:
            y_BLD = self.feed_forward(inputs, feed_forward_key)
        x_BLD = x_BLD + y_BLD if pre else self.feed_forward_norm(x_BLD + y_BLD)
        return x_BLD, Reports(feed_forward=stats, attention=attention_stats), cache


def _attention(key: jax.Array, config: ModelConfig, rules: Rules) -> Attention | ExpertAttention:
    shape = config.attention_shape
    if config.attention is not None:
        return config.attention.build(key, shape, rules)
    heads = (shape.num_heads, shape.kv_heads, shape.head_dim)
    return Attention(key, shape.d_model, heads, rules, shape.rope_base, shape.dropout_rate)
