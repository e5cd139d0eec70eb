"""What the heads of a model cost: parameters of the ordinary and the latent attention, and what scores cost beside."""

from __future__ import annotations

import dataclasses

from sparse_lm.models.config import ModelConfig
from sparse_lm.nn.heads import AttentionShape


@dataclasses.dataclass(frozen=True)
class HeadCost:
    """Parameters of one layer. total: stored, and used by every token. multiplied: those in its matrix products."""

    total: int
    multiplied: int


def head_cost(shape: AttentionShape) -> HeadCost:
    """Of an attention without experts."""
    options, d_model, heads, kv_heads = shape.options, shape.d_model, shape.num_heads, shape.kv_heads
    out_bias = d_model if options.out_bias else 0
    beside = out_bias + (heads if options.sinks else 0)
    if options.latent is not None:
        return _latent_cost(shape, beside)
    width = shape.head_dim
    multiplied = d_model * width * (2 * heads + 2 * kv_heads)  # query and out, key and value
    beside += (heads + 2 * kv_heads) * width if options.qkv_bias else 0
    beside += {"none": 0, "l2": 0, "head": 2 * width, "model": (heads + kv_heads) * width}[options.qk_norm]
    return HeadCost(multiplied + beside, multiplied)


def _latent_cost(shape: AttentionShape, beside: int) -> HeadCost:
    latent = shape.options.latent
    assert latent is not None
    d_model, heads, width, rank = shape.d_model, shape.num_heads, shape.head_dim, latent.kv_rank
    value = latent.value_dim or width
    query, norms = heads * (width + latent.rope_dim), rank
    if latent.query_rank is None:
        multiplied = d_model * query
    else:
        multiplied, norms = latent.query_rank * (d_model + query), rank + latent.query_rank
    multiplied += d_model * (rank + latent.rope_dim) + rank * heads * (width + value) + heads * value * d_model
    return HeadCost(multiplied + beside + norms, multiplied)


def score_widths(config: ModelConfig) -> tuple[tuple[int, int | None], ...]:
    """For each layer, what a query multiplies by per key, and how many keys it sees at most; None is a whole row.

    The former is heads x (width of a key + width of a value); the latter the smaller one of window and chunk.
    """
    latent, width = config.heads.latent, config.width
    both = 2 * width if latent is None else width + latent.rope_dim + (latent.value_dim or width)
    limits = [[limit for limit in (kind.window, kind.chunk) if limit is not None] for kind in config.layers]
    return tuple((config.num_heads * both, min(limit, default=None)) for limit in limits)
