"""Cross-entropy of a large vocabulary without its logits: only those of a chunk of tokens exist at a time.

Logits of all tokens are often the largest array of a training step, in float32, and their gradient is one more. Here
the forward pass keeps one number per token, its logsumexp, and the backward pass makes each chunk's logits once more.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_lm.mesh import axis_index, max_over, sum_over, varying
from sparse_lm.products import einsum
from sparse_lm.sharding import Rules


def chunked_losses(
    x_BLD: Float[Array, "B L D"],
    table_VD: Float[Array, "V D"],
    labels_BL: Int[Array, "B L"],
    chunk: int,
    rules: Rules,
) -> Float[Array, "B L"]:
    """-log softmax(x . table)[label] in nats, as `objectives.causal.token_losses` of the whole logits.

    table_VD: as `Embedding.matrix` gives it; may be cut along V. chunk: tokens of a device whose logits exist at once;
    the last chunk may be partly empty. The gradient of the table is a float32 sum over chunks, and then over devices.
    """

    def body(x_BLD, table_VD, labels_BL):
        tokens = labels_BL.size
        # What enters a custom gradient has to vary: its transpose then is the sum over devices.
        x_MD, table_VD = varying(x_BLD.reshape(tokens, -1)), varying(table_VD)
        nats_M = _losses(x_MD, table_VD, varying(labels_BL.reshape(tokens)), min(chunk, tokens))
        return jnp.reshape(cast(jax.Array, nats_M), labels_BL.shape)

    return rules.per_shard(body, (x_BLD, table_VD, labels_BL), ("BLD", "VD", "BL"), "BL")


class _Chunk(NamedTuple):
    """A chunk's activations, labels and, in the backward pass, logsumexp and the gradient of the losses."""

    x_MD: jax.Array
    label_M: jax.Array
    logsum_M: jax.Array | None = None
    dnats_M: jax.Array | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _losses(x_MD: jax.Array, table_VD: jax.Array, label_M: jax.Array, size: int) -> jax.Array:
    return _forward(x_MD, table_VD, label_M, size)[0]


def _forward(x_MD, table_VD, label_M, size):
    def body(_, chunk):
        logits_MV = _logits(chunk.x_MD, table_VD)
        own_M = jax.nn.logsumexp(logits_MV, axis=-1)
        picked_M = jnp.sum(jnp.where(_is_label(chunk.label_M, table_VD), logits_MV, 0.0), axis=-1)
        return None, (own_M, picked_M)

    _, (own, picked) = jax.lax.scan(body, None, _cut(_Chunk(x_MD, label_M), size))
    # The sums over shards of V wait until all chunks are done: two collectives, however many chunks there are.
    own_M, picked_M = (part.reshape(-1)[: label_M.size] for part in (own, picked))
    most_M = max_over(own_M, "model")
    logsum_M = most_M + jnp.log(sum_over(jnp.exp(own_M - most_M), "model"))
    return logsum_M - sum_over(picked_M, "model"), (x_MD, table_VD, label_M, logsum_M)


def _backward(size, saved, dnats_M):
    x_MD, table_VD, label_M, logsum_M = saved

    def body(dtable_VD, chunk):
        logits_MV, transpose = jax.vjp(_logits, chunk.x_MD, table_VD)
        one_hot_MV = _is_label(chunk.label_M, table_VD).astype(jnp.float32)
        dlogits_MV = chunk.dnats_M[:, None] * (jnp.exp(logits_MV - chunk.logsum_M[:, None]) - one_hot_MV)
        dx_MD, more_VD = transpose(dlogits_MV)
        return dtable_VD + more_VD.astype(jnp.float32), dx_MD

    start = varying(jnp.zeros(table_VD.shape, jnp.float32))
    chunks = _cut(_Chunk(x_MD, label_M, varying(logsum_M), varying(dnats_M)), size)
    dtable_VD, dx = jax.lax.scan(body, start, chunks)
    return dx.reshape(-1, x_MD.shape[1])[: label_M.size], dtable_VD.astype(table_VD.dtype), None


_losses.defvjp(_forward, _backward)


def _logits(x_MD, table_VD):
    return einsum("MD,VD->MV", x_MD, table_VD, dtype=jnp.float32)


def _is_label(label_M, table_VD):
    """Where a shard of the vocabulary has each token's label."""
    rows = table_VD.shape[0]
    return axis_index("model") * rows + jnp.arange(rows) == label_M[:, None]


def _cut(chunk: _Chunk, size: int) -> _Chunk:
    """[M, ...] -> [M / size, size, ...]; the room that is left is zero, in the gradient of the losses as well."""

    def cut(x):
        x = jnp.pad(x, [(0, -len(x) % size), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(-1, size, *x.shape[1:])

    return jax.tree.map(cut, chunk)
