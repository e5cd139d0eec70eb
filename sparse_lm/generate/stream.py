"""Generation: prompts in, one step's tokens at a time out, with a key/value cache.

Two programs are compiled: one runs the prompts, the other one token of every sequence. Prompts of unequal length are
aligned at their ends: the padding before them is segment 0, which nothing looks at, and positions count from the first
real token, so that a sequence's result is the same in any batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparse_lm.config import ConfigError
from sparse_lm.generate.sample import Sampling, sample
from sparse_lm.models.block import Block
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.decoder import Decoder, DecoderCache
from sparse_lm.models.stack import Stack, refuse_stages
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.layer import MoE

SHORTEST = 16  # prompts are padded to a power of two, at least this, so that few lengths are ever compiled


def for_generation(model: Decoder) -> Decoder:
    """The same parameters in a model whose sparse layers drop nothing, so that no token depends on its batch.

    Every sequence is a routing group of its own, with room for all its tokens at every expert. A dense model is
    returned as it is. Raises `ConfigError` when routing looks at later tokens: those do not exist yet.
    """
    moe = model.config.moe
    if moe is None:
        return model
    # Grouped by position, a router that is not causal decides by other rows, which generation does not have either.
    if not moe.causal or not moe.router.causal:
        raise ConfigError(
            "model.moe",
            f"{type(moe.router).__name__}, priority={moe.priority}",
            "routes or drops by other tokens, which generation does not have; train with a causal router, and with "
            "model.moe.priority=token or without drops (both capacity factors None)",
        )
    copy = jax.tree.map(lambda leaf: leaf, model)  # new modules around the same arrays
    for _, module in nnx.iter_modules(copy):
        if isinstance(module, MoE):
            module.config = _dropless(module.config)
        elif isinstance(module, Decoder | Stack | Block):
            module.config = module.config.replace(moe=_dropless(moe))
    return copy


def generate(
    model: Decoder,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    max_new_tokens: int,
    key: jax.Array,
    eos: int | None = None,
) -> Iterator[np.ndarray]:
    """Continues every prompt, yielding the tokens [B], int32, of one step after another.

    prompts: token ids, one array per sequence. An empty one starts from a single `eos` token, which is not yielded.
        A model that was trained on documents which *end* in this token has seen nothing after it: expect a poor start.
    eos: a sequence that yields it has ended and yields it from then on; generation stops when all have. None: never.
    key: with the same key, sampling and prompts the same tokens come, also for a prefix of the batch.

    With a mesh set, which has no stages, B is a multiple of the devices that share the batch. Raises `ConfigError` at
    the call (not at the first token) when an argument is out of range, when a learned position table is too short, and
    as `for_generation`.
    """
    prompts = _checked(model.config, prompts, max_new_tokens, eos)
    _check_mesh(model, len(prompts))
    return _tokens(for_generation(model), prompts, sampling, max_new_tokens, key, eos)


def _tokens(model, prompts, sampling, max_new_tokens, key, eos) -> Iterator[np.ndarray]:
    longest = max(len(prompt) for prompt in prompts)
    length = max(SHORTEST, 1 << (longest - 1).bit_length())
    padding_B = np.asarray([length - len(prompt) for prompt in prompts], np.int32)
    tokens_BL = np.stack([np.pad(prompt, (length - len(prompt), 0)) for prompt in prompts])
    ended_B = np.zeros(len(prompts), bool)
    next_B, cache = _prefill(model, tokens_BL, padding_B, jax.random.fold_in(key, 0), sampling, length + max_new_tokens)
    for i in range(max_new_tokens):
        yielded_B = np.asarray(next_B)
        if eos is not None:
            yielded_B = np.where(ended_B, np.int32(eos), yielded_B)
            ended_B = yielded_B == eos
        yield yielded_B
        if i + 1 == max_new_tokens or ended_B.all():
            return
        # The noise counts new tokens, not places: those depend on how far the prompts were padded.
        noise = jax.random.fold_in(key, i + 1)
        next_B, cache = _step(model, next_B[:, None], padding_B, np.int32(length + i), cache, noise, sampling)


@functools.partial(jax.jit, static_argnames=("sampling", "places"))
def _prefill(model: Decoder, tokens_BL, padding_B, key, sampling: Sampling, places: int):
    cache = model.empty_cache(tokens_BL.shape[0], places)
    return _advance(model, tokens_BL, padding_B, jnp.zeros((), jnp.int32), cache, key, sampling)


@functools.partial(jax.jit, static_argnames="sampling", donate_argnames="cache")
def _step(model: Decoder, tokens_B1, padding_B, start, cache: DecoderCache, key, sampling: Sampling):
    return _advance(model, tokens_B1, padding_B, start, cache, key, sampling)


def _advance(model, tokens_BL, padding_B, start, cache, key, sampling):
    """Tokens that follow these, and the cache with these in it."""
    rules, length = model.rules, tokens_BL.shape[1]
    places = cache.tokens_BT.shape[1]
    # Places that are still to be written count as real: causality alone hides them.
    segments_BT = (jnp.arange(places) >= padding_B[:, None]).astype(jnp.int32)
    positions_BL = jnp.maximum(start + jnp.arange(length) - padding_B[:, None], 0)
    logits_BLV, cache = model.extend(
        rules.constrain(tokens_BL, "B."),
        rules.constrain(segments_BT, "BT"),
        rules.constrain(positions_BL, "B."),
        start,
        cache,
    )
    # Sorting and drawing are done by every device alike: a row of logits is small, and sorts do not shard.
    last_BV = rules.constrain(logits_BLV[:, -1], "..")
    return sample(last_BV, sampling, key), cache


def _dropless(moe: MoEConfig) -> MoEConfig:
    return dataclasses.replace(moe, capacity_factor_eval=None, group_size=None, grouping="sequence")


def _checked(config: ModelConfig, prompts: Sequence[np.ndarray], max_new_tokens: int, eos: int | None):
    """The prompts as int32, empty ones filled; raises `ConfigError` on what cannot be generated."""
    vocab_size = config.vocab_size or 0
    if max_new_tokens < 1:
        raise ConfigError("max_new_tokens", max_new_tokens, "must be at least 1")
    if not prompts:
        raise ConfigError("prompts", list(prompts), "there is none; an empty text is a prompt too, if there is an eos")
    if eos is not None and not 0 <= eos < vocab_size:
        raise ConfigError("eos", eos, f"is no token of the model, which has {vocab_size}; None never stops")
    filled = []
    for i, prompt in enumerate(prompts):
        prompt = np.asarray(prompt)
        if prompt.size == 0:
            if eos is None:
                raise ConfigError(f"prompts[{i}]", "", "is empty and no eos is given to start from; give one token")
            prompt = np.asarray([eos])
        if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
            raise ConfigError(f"prompts[{i}]", prompt, "must be a vector of token ids")
        outside = prompt[(prompt < 0) | (prompt >= vocab_size)]
        if outside.size:
            raise ConfigError(f"prompts[{i}]", int(outside[0]), f"is no token of the model, which has {vocab_size}")
        filled.append(prompt.astype(np.int32))
    longest, table = max(len(prompt) for prompt in filled), config.max_length
    # The last new token is never read, and so needs no position.
    if config.position == "learned" and table is not None and longest + max_new_tokens - 1 > table:
        way_out = f"ask for at most {table + 1 - longest}" if longest <= table else "shorten the prompt"
        raise ConfigError(
            "max_new_tokens", max_new_tokens,
            f"with a prompt of {longest} tokens goes beyond the {table} learned positions; {way_out}",
        )  # fmt: skip
    return filled


def _check_mesh(model: Decoder, batch: int) -> None:
    refuse_stages()
    mesh = jax.sharding.get_abstract_mesh()
    axes = model.rules.act("B")[0] or ()
    shards = math.prod(mesh.shape.get(axis, 1) for axis in ((axes,) if isinstance(axes, str) else axes))
    if batch % shards:
        raise ConfigError(
            "prompts", batch, f"prompts cannot be shared by {shards} devices; add some, or use a mesh of one device"
        )
