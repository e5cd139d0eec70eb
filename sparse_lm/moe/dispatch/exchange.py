"""Rows from every device of the `expert` axis to every other, as many as each has for each: a ragged all-to-all.

Or within runs of neighbours along that axis, see `dispatch.replicas`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from sparse_lm.mesh import platform
from sparse_lm.moe.dispatch.replicas import place, runs
from sparse_lm.moe.dispatch.traffic import Moves


def exchange(x_RD: jax.Array, moves: Moves, rows: int) -> jax.Array:
    """Sends this device's rows where they go, and returns `rows` rows: those for it in their places, zeros elsewhere.

    The gradient takes the way back.
    """
    result = _exchange(x_RD, moves, rows, x_RD.shape[0])
    assert isinstance(result, jax.Array)
    return result


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _exchange(x_RD, moves, rows, back):
    return move(x_RD, moves, rows)


def _forward(x_RD, moves, rows, back):
    return _exchange(x_RD, moves, rows, back), moves


def _backward(rows, back, moves, dy_RD):
    return move(dy_RD, moves.back, back), None


_exchange.defvjp(_forward, _backward)


def move(x_RD: jax.Array, moves: Moves, rows: int) -> jax.Array:
    """The same for any type and without a gradient."""
    devices = moves.size_NN.shape[0]
    here, groups = place(devices), runs(devices)
    leaving = moves.from_NN[here], moves.size_NN[here]
    if platform() == "cpu":
        return _padded(x_RD, leaving, (moves.to_NN[:, here], moves.size_NN[:, here]), rows, groups)
    output = jnp.zeros_like(x_RD, shape=(rows, *x_RD.shape[1:]))
    described = (*leaving, moves.to_NN[here], moves.size_NN[:, here])
    return jax.lax.ragged_all_to_all(x_RD, output, *described, axis_name="expert", axis_index_groups=groups)


def _padded(x_RD: jax.Array, leaving, arriving, rows: int, groups) -> jax.Array:
    """The same by an ordinary all-to-all, every part of it as long as the longest could be.

    leaving, arriving: (first row, number of rows) for each device and from each. XLA has no ragged one on CPU
    (https://github.com/jax-ml/jax/issues/34755).
    """
    most = min(x_RD.shape[0], rows)  # one device to another: neither can have more
    (from_N, sent_N), (to_N, received_N) = leaving, arriving
    number_NR = jnp.arange(most, dtype=jnp.int32)[None]
    own_NR = jnp.where(number_NR < sent_N[:, None], from_N[:, None] + number_NR, x_RD.shape[0])
    parts_NRD = jax.lax.all_to_all(_taken(x_RD, own_NR), "expert", 0, 0, axis_index_groups=groups, tiled=True)
    row_Q = jnp.arange(rows, dtype=jnp.int32)
    sender_Q = jnp.searchsorted(to_N, row_Q, side="right").astype(jnp.int32) - 1  # the last that begins there
    number_Q = row_Q - to_N[sender_Q]
    there_Q = (sender_Q >= 0) & (number_Q < received_N[sender_Q])
    flat = parts_NRD.reshape(-1, *x_RD.shape[1:])
    return _taken(flat, jnp.where(there_Q, sender_Q * most + number_Q, flat.shape[0]))


def _taken(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="fill", fill_value=0)
