"""Attention by kernels that others keep: Splash attention on TPUs, cuDNN's fused attention on NVIDIA GPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_lm.config import ConfigError
from sparse_lm.nn.attend.chunked import Operands, Scoring, chunked
from sparse_lm.nn.attend.sight import Sight

LANES = 128  # the blocks of Splash attention are multiples of it
CUDNN_WIDTHS = (8, 128)  # widths of heads are multiples of the first, up to the second


def splash_block(length: int, block: int) -> int | None:
    """The largest multiple of 128 up to `block` (or 128) that divides the length; None where there is none."""
    sizes = [size for size in range(LANES, max(block, LANES) + 1, LANES) if length % size == 0]
    return max(sizes, default=None)


def splash(
    operands: Operands, sight: Sight, scoring: Scoring, block: int, interpret: bool = False
) -> Float[Array, "B L H W"]:
    """See `attend`; for plain local arrays of whole rows. interpret: runs the kernel's program anywhere, slowly.

    Raises `ConfigError` when no block divides the length.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    query_BLHI, key_BTJI, value_BTJW, sinks_H = operands
    scale, cap = scoring
    length, num_heads = query_BLHI.shape[1:3]
    size = splash_block(length, block)
    if size is None:
        raise ConfigError(
            "data.length", length, f"splash needs a multiple of {LANES}; or model.heads.implementation=chunked"
        )
    shape = (length, length)
    window = sight.reach
    mask = library.CausalMask(shape) if window is None else library.LocalMask(shape, (window - 1, 0), 0)
    kernel = library.make_splash_mha(
        library.MultiHeadMask([mask] * num_heads),
        block_sizes=_sizes(library, size),
        attn_logits_soft_cap=cap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    # A chunk of a document is a document of its own, and begins at a place where no other chunk of the row does.
    segments_BL = sight.query_segments_BL
    if sight.floor_BL is not None:
        segments_BL = jnp.where(segments_BL > 0, sight.floor_BL + 1, 0)
    # The kernel has no scale.
    query_BHLI = jnp.swapaxes(query_BLHI * jnp.asarray(scale, query_BLHI.dtype), 1, 2)
    key_BJTI, value_BJTW = (jnp.swapaxes(x, 1, 2) for x in (key_BTJI, value_BTJW))

    # The kernel gives the gradient of sinks in the dtype of its result, and wants them in it.
    sinks_H = None if sinks_H is None else sinks_H.astype(query_BLHI.dtype)

    def row(query, key, value, segments):
        return kernel(query, key, value, library.SegmentIds(segments, segments), sinks=sinks_H)

    mixed_BHLW = jax.vmap(row)(query_BHLI, key_BJTI, value_BJTW, segments_BL)
    mixed_BLHW = jnp.swapaxes(mixed_BHLW, 1, 2)  # type: ignore[arg-type]
    return jnp.where(segments_BL[:, :, None, None] > 0, mixed_BLHW, 0).astype(query_BLHI.dtype)


def cudnn(operands: Operands, sight: Sight, scoring: Scoring, block: int) -> Float[Array, "B L H W"]:
    """See `attend`; for plain local arrays of whole rows, without sinks, soft cap and chunks.

    The kernel knows padding at the end of a row, and no documents. Where a row has several, all rows go the way of
    `chunked`, which is decided when the program runs.
    """
    query_BLHI, key_BTJI, value_BTJW, sinks_H = operands
    scale, cap = scoring
    assert sinks_H is None and cap is None and sight.floor_BL is None
    segments_BL = sight.query_segments_BL
    real_BL = segments_BL > 0
    length_B = jnp.sum(real_BL, axis=1, dtype=jnp.int32)
    window = None if sight.window is None else (sight.window - 1, 0)

    def fused(query, key, value):
        mixed = jax.nn.dot_product_attention(
            query,
            key,
            value,
            scale=scale,
            is_causal=True,
            query_seq_lengths=length_B,
            key_value_seq_lengths=length_B,
            local_window_size=window,
            implementation="cudnn",
        )
        return jnp.where(real_BL[:, :, None, None], mixed, 0)

    def exact(query, key, value):
        return chunked((query, key, value, None), sight, scoring, block)

    single = jnp.all((segments_BL == segments_BL[:, :1]) | ~real_BL) & jnp.all(real_BL[:, 1:] <= real_BL[:, :-1])
    return jax.lax.cond(single, fused, exact, query_BLHI, key_BTJI, value_BTJW)


def _sizes(library, size: int):
    return library.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
