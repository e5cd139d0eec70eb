"""Rows from every device of the `expert` axis to every other, as many as each has for each: a ragged all-to-all.

Or within runs of neighbours along that axis, see `dispatch.replicas`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparse_lm.mesh import platform
from sparse_lm.moe.dispatch.replicas import place, runs


def exchange(x_RD: jax.Array, size_NN: Int[Array, "N N"], rows: int, back: int) -> jax.Array:
    """Sends this device's rows, sorted by destination, and returns those for it, sorted by sender; zeros behind them.

    size_NN: rows from each device of the run (first index) to each, the same on all of them. rows: of the result,
    which have to be enough for all that is sent here. back: rows of x, which the gradient has again.
    The gradient takes the way back, which is the same exchange by the transposed table.
    """
    result = _exchange(x_RD, size_NN, rows, back)
    assert isinstance(result, jax.Array)
    return result


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _exchange(x_RD, size_NN, rows, back):
    return move(x_RD, size_NN, rows)


def _forward(x_RD, size_NN, rows, back):
    return _exchange(x_RD, size_NN, rows, back), size_NN


def _backward(rows, back, size_NN, dy_RD):
    return move(dy_RD, size_NN.T, back), None


_exchange.defvjp(_forward, _backward)


def move(x_RD: jax.Array, size_NN: Int[Array, "N N"], rows: int) -> jax.Array:
    """The same for any type and without a gradient."""
    devices = size_NN.shape[0]
    here, groups = place(devices), runs(devices)
    sent_N, received_N = size_NN[here], size_NN[:, here]
    if devices == 1:
        return _taken(x_RD, jnp.where(jnp.arange(rows) < sent_N[0], jnp.arange(rows), x_RD.shape[0]))
    if platform() == "cpu":
        return _padded(x_RD, sent_N, received_N, rows, groups)
    output = jnp.zeros_like(x_RD, shape=(rows, *x_RD.shape[1:]))
    place_N = _before(size_NN)[here]
    described = (_before(sent_N), sent_N, place_N, received_N)
    return jax.lax.ragged_all_to_all(x_RD, output, *described, axis_name="expert", axis_index_groups=groups)


def _padded(x_RD: jax.Array, sent_N: jax.Array, received_N: jax.Array, rows: int, groups) -> jax.Array:
    """The same by an ordinary all-to-all, every part of it as long as the longest could be.

    XLA has no ragged one on CPU (https://github.com/jax-ml/jax/issues/34755).
    """
    most = min(x_RD.shape[0], rows)  # one device to another: neither can have more
    number_NR = jnp.arange(most, dtype=jnp.int32)[None]
    own_NR = jnp.where(number_NR < sent_N[:, None], _before(sent_N)[:, None] + number_NR, x_RD.shape[0])
    parts_NRD = jax.lax.all_to_all(_taken(x_RD, own_NR), "expert", 0, 0, axis_index_groups=groups, tiled=True)
    row_Q = jnp.arange(rows, dtype=jnp.int32)
    sender_Q = jnp.searchsorted(jnp.cumsum(received_N), row_Q, side="right").astype(jnp.int32)
    number_Q = row_Q - _before(received_N).at[sender_Q].get(mode="clip")
    flat = parts_NRD.reshape(-1, *x_RD.shape[1:])
    return _taken(flat, jnp.where(row_Q < jnp.sum(received_N), sender_Q * most + number_Q, flat.shape[0]))


def _before(size: jax.Array) -> jax.Array:
    """Sums of what stands before along the first axis."""
    return jnp.cumsum(size, axis=0, dtype=size.dtype) - size


def _taken(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="fill", fill_value=0)
