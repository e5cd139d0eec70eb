"""Who sends how many rows to whom, and where a part of them begins: integers that all devices which exchange know.

What a device receives is one list, sorted by sender, and the rows of a sender by expert. A window is as many rows of
every device's list as there is room for; all windows together are all rows.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparse_lm.mesh import TOKEN_AXES, max_over
from sparse_lm.moe.dispatch.replicas import place, runs, sharers
from sparse_lm.moe.grouped import Layout, before


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moves:
    """N: devices that exchange, the sender first. All of it is the same on all of them.

    size_NN: rows from each to each. from_NN: where they begin with the sender. to_NN: where with the receiver. Neither
    falls along a row or a column: what is for a later device, or comes from one, lies later.
    """

    size_NN: Int[Array, "N N"]
    from_NN: Int[Array, "N N"]
    to_NN: Int[Array, "N N"]

    @classmethod
    def of(cls, size_NN: Int[Array, "N N"]) -> Moves:
        """All rows, side by side with their senders and receivers."""
        return cls(size_NN, before(size_NN, axis=1), before(size_NN, axis=0))

    @property
    def back(self) -> Moves:
        """The same rows on the way back."""
        return Moves(self.size_NN.T, self.to_NN.T, self.from_NN.T)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Traffic:
    """moves: see there. arriving_NE: rows for the experts that this device computes, by sender."""

    moves: Moves
    arriving_NE: Int[Array, "N E"]

    @classmethod
    def of(cls, count_X: Int[Array, "all_experts"]) -> Traffic:
        """All rows. count_X: those that this device has for each expert of each device, in turn."""
        devices = sharers(count_X.size)
        count_NX = jax.lax.all_gather(count_X, axis_name="expert", axis_index_groups=runs(devices))
        count_NNE = count_NX.reshape(devices, devices, -1)
        return cls(Moves.of(jnp.sum(count_NNE, axis=2)), count_NNE[:, place(devices)])

    @property
    def most(self) -> Int[Array, ""]:
        """The length of the longest list of any device of the mesh, which all of them learn."""
        return functools.reduce(max_over, TOKEN_AXES, jnp.max(jnp.sum(self.moves.size_NN, axis=0)))

    def window(self, start: jax.Array | int, room: int) -> Traffic:
        """What is in the one that begins with row `start` of every list and has `room` rows."""
        moves, count_NE = self.moves, self.arriving_NE
        to_NN, size_NN = _inside(moves.to_NN, moves.size_NN, start, room)
        earlier_NN = jnp.clip(start - moves.to_NN, 0, moves.size_NN)
        count_X = count_NE.reshape(-1)
        _, arriving_X = _inside(before(count_X), count_X, start, room)
        return Traffic(Moves(size_NN, moves.from_NN + earlier_NN, to_NN), arriving_X.reshape(count_NE.shape))

    def rows_in(self, layout: Layout, room: int) -> Int[Array, "Q"]:
        """Where in the layout each of `room` received rows belongs; `layout.rows` for those that hold nothing.

        In the layout the expert comes first, then the sender.
        """
        count_X = self.arriving_NE.reshape(-1)
        place_X = (layout.first_row_E + before(self.arriving_NE)).reshape(-1)
        start_X = before(count_X)
        part_Q = jnp.repeat(jnp.arange(count_X.size), count_X, total_repeat_length=room)
        row_Q = jnp.arange(room, dtype=jnp.int32)
        return jnp.where(row_Q < jnp.sum(count_X), place_X[part_Q] + row_Q - start_X[part_Q], layout.rows)


def _inside(first: jax.Array, size: jax.Array, start: jax.Array | int, room: int) -> tuple[jax.Array, jax.Array]:
    """(first, size) of what lies in the `room` rows from `start` on, counted from there."""
    begin, end = jnp.clip(first - start, 0, room), jnp.clip(first + size - start, 0, room)
    return begin, end - begin
