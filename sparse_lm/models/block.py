"""One Transformer layer: attention and a feed-forward part that is dense or sparse."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparse_lm.models.config import LayerKind, ModelConfig
from sparse_lm.models.reports import Reports
from sparse_lm.moe.attention import AttentionInputs, ExpertAttention
from sparse_lm.moe.layer import MoE
from sparse_lm.moe.types import Replay
from sparse_lm.nn.attend import Sight
from sparse_lm.nn.attention import Attention
from sparse_lm.nn.cache import AttentionCache
from sparse_lm.nn.dropout import split_keys
from sparse_lm.nn.latent import LatentAttention
from sparse_lm.nn.mlp import Mlp
from sparse_lm.sharding import Rules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of a forward pass sees beside the activations.

    ids_BL: token ids. positions_BL, sight: see `Attention`. real_BL: False is padding. start: index in the cache of
    the first token, or None without a cache. previous_BL: id of the token before in the same document, -1 where there
    is none; None is -1 everywhere. replay: see `moe.types.Replay`, of this layer, or of all stacked in a whole model.
    carried_BLE: what the sparse layer before handed on to the router; None where routers ask for nothing.
    """

    ids_BL: Int[Array, "B L"]
    positions_BL: Int[Array, "B L"]
    sight: Sight
    real_BL: Bool[Array, "B L"]
    start: jax.Array | None = None
    previous_BL: Int[Array, "B L"] | None = None
    replay: Replay | None = None
    carried_BLE: Float[Array, "B L E"] | None = None


class Block(nnx.Module):
    """x + attention, then x + feed-forward, normalised before (`pre`), after (`post`) or around (`sandwich`)."""

    def __init__(self, key: jax.Array, config: ModelConfig, kind: LayerKind, rules: Rules):
        attention, feed_forward = jax.random.split(key)
        self.config = config
        self.attention = _attention(attention, config, kind, rules)
        if kind.sparse:
            assert config.moe is not None
            self.feed_forward: MoE | Mlp = MoE(
                feed_forward, config.d_model, config.d_expert, config.activation, config.moe, rules
            )
        else:
            self.feed_forward = Mlp(feed_forward, config.d_model, config.d_ff, config.activation, rules, config.dropout)
        self.attention_norm = config.build_norm(rules)
        self.feed_forward_norm = config.build_norm(rules)
        sandwich = config.norm_position == "sandwich"
        self.attention_post_norm = config.build_norm(rules) if sandwich else None
        self.feed_forward_post_norm = config.build_norm(rules) if sandwich else None

    def __call__(
        self, x_BLD: Float[Array, "B L D"], context: Context, key: jax.Array | None, cache: AttentionCache | None = None
    ) -> tuple[Float[Array, "B L D"], Reports, AttentionCache | None]:
        """The layer's output, its reports and its cache with this pass in it."""
        pre = self.config.norm_position != "post"
        attention_key, feed_forward_key = split_keys(key, 2)
        # The cache is of the kind that this layer made.
        stored = None if cache is None or context.start is None else (cache, context.start)

        inputs = self.attention_norm(x_BLD) if pre else x_BLD
        attention_stats = None
        if isinstance(self.attention, ExpertAttention):
            record = context.replay is not None and context.replay.record
            where = (context.positions_BL, context.sight, context.real_BL)
            seen = AttentionInputs(*where, context.ids_BL, context.previous_BL, record)
            y_BLD, cache, attention_stats = self.attention(inputs, seen, attention_key, stored)  # type: ignore[arg-type]
        else:
            y_BLD, cache = self.attention(inputs, context.positions_BL, context.sight, attention_key, stored)  # type: ignore[arg-type]
        if self.attention_post_norm is not None:
            y_BLD = self.attention_post_norm(y_BLD)
        x_BLD = x_BLD + y_BLD if pre else self.attention_norm(x_BLD + y_BLD)

        inputs = self.feed_forward_norm(x_BLD) if pre else x_BLD
        stats = None
        if isinstance(self.feed_forward, MoE):
            beside = (context.ids_BL, context.previous_BL, context.replay, context.carried_BLE)
            y_BLD, stats = self.feed_forward(inputs, context.real_BL, feed_forward_key, *beside)
        else:
            y_BLD = self.feed_forward(inputs, feed_forward_key)
        if self.feed_forward_post_norm is not None:
            y_BLD = self.feed_forward_post_norm(y_BLD)
        x_BLD = x_BLD + y_BLD if pre else self.feed_forward_norm(x_BLD + y_BLD)
        return x_BLD, Reports(feed_forward=stats, attention=attention_stats), cache


def _attention(
    key: jax.Array, config: ModelConfig, kind: LayerKind, rules: Rules
) -> Attention | LatentAttention | ExpertAttention:
    shape = config.shape_of(kind)
    if config.attention is not None:
        return config.attention.build(key, shape, rules)
    return (Attention if config.heads.latent is None else LatentAttention)(key, shape, rules)
