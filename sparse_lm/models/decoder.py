"""The decoder-only language model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Scalar

from sparse_lm.models.block import Context
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.depth import DepthCache
from sparse_lm.models.reports import Reports
from sparse_lm.models.stack import Cache, Stack
from sparse_lm.moe.types import Replay, pytree_dataclass
from sparse_lm.nn.attend import continued_sight, row_sight
from sparse_lm.nn.dropout import dropout, split_keys
from sparse_lm.nn.embed import Embedding
from sparse_lm.nn.position import LearnedPositions, sinusoidal
from sparse_lm.sharding import Rules


@pytree_dataclass
class DecoderCache:
    """What the tokens so far have left: keys and values of every layer, and their ids, for routers that look back."""

    layers: Cache
    tokens_BT: Int[Array, "B T"]


def previous_tokens(tokens_BL: Int[Array, "B L"], segments_BL: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """The id of the token before each one, -1 where there is none in its document (segment), and in padding."""
    before_BL = jnp.concatenate([tokens_BL[:, :1], tokens_BL[:, :-1]], axis=1)
    # The first place has no segment of its own before it.
    same_BL = jnp.concatenate([segments_BL[:, :1] < 0, segments_BL[:, 1:] == segments_BL[:, :-1]], axis=1)
    return jnp.where(same_BL & (segments_BL > 0), before_BL, -1)


def row_context(
    tokens_BL: Int[Array, "B L"], segments_BL: Int[Array, "B L"], positions_BL: Int[Array, "B L"]
) -> Context:
    """What layers see of rows whose tokens look at each other; see `Batch`."""
    previous_BL = previous_tokens(tokens_BL, segments_BL)
    return Context(tokens_BL, positions_BL, row_sight(segments_BL), segments_BL > 0, previous_BL=previous_BL)


class Decoder(nnx.Module):
    """Tokens in, logits of the next token out."""

    def __init__(self, key: jax.Array, config: ModelConfig, rules: Rules):
        """config: with `vocab_size` set, and `max_length` for learned positions."""
        embed, unembed, positions, stack = jax.random.split(key, 4)
        assert config.vocab_size is not None
        self.config, self.rules = config, rules
        self.embedding = Embedding(embed, config.vocab_size, config.d_model, rules)
        tied = config.tie_embeddings
        self.unembedding = None if tied else Embedding(unembed, config.vocab_size, config.d_model, rules)
        learned = config.position == "learned"
        assert config.max_length is not None or not learned
        self.positions = LearnedPositions(positions, config.max_length or 0, config.d_model, rules) if learned else None
        self.stack = Stack(stack, config, rules)
        self.norm = None if config.norm_position == "post" else config.build_norm(rules)

    def __call__(
        self,
        tokens_BL: Int[Array, "B L"],
        segments_BL: Int[Array, "B L"],
        positions_BL: Int[Array, "B L"],
        key: jax.Array | None = None,
        replay: Replay | None = None,
    ) -> tuple[Float[Array, "B L V"], Reports]:
        """Float32 logits and what the layers report.

        segments_BL, positions_BL: see `Batch`. key: None is evaluation. replay: see `moe.types.Replay`; forced
        decisions are stacked over the sparse layers, as they are handed out. Raises `ValueError` when they are of
        another number of layers, and in training with layers that tokens may skip.
        """
        x_BLD, reports = self.hidden(tokens_BL, segments_BL, positions_BL, key, replay)
        return self.head.decode(x_BLD), reports

    def hidden(
        self,
        tokens_BL: Int[Array, "B L"],
        segments_BL: Int[Array, "B L"],
        positions_BL: Int[Array, "B L"],
        key: jax.Array | None = None,
        replay: Replay | None = None,
    ) -> tuple[Float[Array, "B L D"], Reports]:
        """What `head` makes logits of, in the compute dtype; for the rest see the call of the model."""
        self._check(replay, key)
        context = dataclasses.replace(row_context(tokens_BL, segments_BL, positions_BL), replay=replay)
        x_BLD, reports, _ = self._forward(context, key, None)
        return x_BLD, reports

    @property
    def head(self) -> Embedding:
        """What makes logits of the activations behind the last layer; the embedding itself where they are tied."""
        return self.unembedding or self.embedding

    def empty_cache(self, batch: int, length: int) -> DecoderCache:
        """Room for `length` tokens of `batch` sequences, in the compute dtype."""

        def room(repeats, kind):
            shape = self.config.shape_of(kind)
            stored = shape.empty_cache((repeats, batch, length), self.config.dtype, self.rules)
            taken_NBT = jnp.zeros((repeats, batch, length), bool)
            return DepthCache(stored, self.rules.constrain(taken_NBT, "NBT")) if kind.wrapped else stored

        layers = tuple(tuple(room(repeats, kind) for kind in pattern) for repeats, pattern in self.stack.plan)
        return DecoderCache(layers, self.rules.constrain(jnp.zeros((batch, length), jnp.int32), "BT"))

    def extend(
        self,
        tokens_BL: Int[Array, "B L"],
        segments_BT: Int[Array, "B T"],
        positions_BL: Int[Array, "B L"],
        start: Scalar,
        cache: DecoderCache,
    ) -> tuple[Float[Array, "B L V"], DecoderCache]:
        """Logits of L tokens that continue the cache at index `start`, and the cache with them in it.

        segments_BT: segment of every place of the cache, those of the new tokens included; 0 is padding.
        """
        segments_BL = jax.lax.dynamic_slice_in_dim(segments_BT, start, tokens_BL.shape[1], axis=1)
        sight = continued_sight(segments_BL, segments_BT, start)
        tokens_BT = jax.lax.dynamic_update_slice_in_dim(cache.tokens_BT, tokens_BL, start, axis=1)
        previous_BT = previous_tokens(tokens_BT, segments_BT)
        previous_BL = jax.lax.dynamic_slice_in_dim(previous_BT, start, tokens_BL.shape[1], axis=1)
        context = Context(tokens_BL, positions_BL, sight, segments_BL > 0, start, previous_BL)
        x_BLD, _, layers = self._forward(context, None, cache.layers)
        assert layers is not None
        return self.head.decode(x_BLD), DecoderCache(layers, tokens_BT)

    def _check(self, replay: Replay | None, key: jax.Array | None) -> None:
        if replay is None:
            return
        if self.config.depth is not None and key is not None:
            raise ValueError(
                "model.depth: in training other tokens reach other layers, so that no replay fits; use key=None"
            )
        layers = sum(self.config.sparse)
        if replay.forced is not None and replay.forced.expert_GSK.shape[0] != layers:
            got = replay.forced.expert_GSK.shape[0]
            raise ValueError(f"the forced decisions are of {got} layers and the model has {layers} sparse ones")

    def embed(self, context: Context, key: jax.Array | None) -> Float[Array, "B L D"]:
        """What the first layer gets, in the compute dtype."""
        dtype = jnp.dtype(self.config.dtype)
        x_BLD = self.embedding.encode(context.ids_BL, dtype)
        if self.positions is not None:
            x_BLD = x_BLD + self.positions(context.positions_BL, dtype)
        elif self.config.position == "sinusoidal":
            x_BLD = x_BLD + sinusoidal(context.positions_BL, self.config.d_model).astype(dtype)
        return dropout(x_BLD, self.config.dropout, key)

    def normed(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """What `head` reads, from what the last layer gives."""
        return x_BLD if self.norm is None else self.norm(x_BLD)

    def _forward(self, context, key, cache):
        embed_key, stack_key = split_keys(key, 2)
        x_BLD, reports, cache = self.stack(self.embed(context, embed_key), context, stack_key, cache)
        return self.normed(x_BLD), reports, cache


def build_decoder(key: jax.Array, config: ModelConfig, rules: Rules) -> Decoder:
    """A decoder with fresh weights, each made where the rules put it. Compiled as one program."""
    return jax.jit(lambda key: rules.shard_parameters(Decoder(key, config, rules)))(key)
