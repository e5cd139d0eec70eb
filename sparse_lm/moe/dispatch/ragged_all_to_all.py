"""Expert parallelism without a capacity: experts stay, and exactly the rows that there are go to them and back."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparse_lm.moe.dispatch.base import Dispatcher, in_chunks
from sparse_lm.moe.dispatch.dropless import experts_on_rows, loads, sorted_routes
from sparse_lm.moe.dispatch.exchange import exchange, move
from sparse_lm.moe.dispatch.gather import permuted
from sparse_lm.moe.dispatch.hot import Hot
from sparse_lm.moe.dispatch.replicas import place, runs, sharers
from sparse_lm.moe.grouped import Layout


class RaggedAllToAll(Dispatcher):
    """Sorts by destination, tells all devices the counts, exchanges, sorts by expert, and takes the same way back.

    A device has room for all assignments of the devices that it shares the experts with, since all may choose its
    experts: nothing is dropped, whatever the mesh. With `exchange_chunks` above 1 it does all of that for a part of
    every group's tokens at a time. With `hot_copies`, see `dispatch.hot`, less room is enough.
    """

    moves_tokens = True
    has_capacity = False

    def local(self, experts, x_GSD, decision, ids_GS, key):
        """See `Dispatcher.local`."""
        chunks = self.exchange_chunks if sharers(experts.num_experts) > 1 else 1
        # Nothing is dropped, so that the tokens of a chunk know nothing of the others.
        return in_chunks(lambda tokens: self._chunk(experts, tokens, key), (x_GSD, decision, ids_GS), chunks)

    def _chunk(self, experts, tokens, key):
        x_GSD, decision, ids_GS = tokens
        kernel, rows = self.kernel, decision.expert_GSK.size
        hot = Hot.of(decision, experts.num_experts, self.hot_copies)
        experts, choice = hot.with_copies(experts), hot.renumbered(decision)
        count_X = loads(choice, hot.each * hot.devices)
        routes = sorted_routes(choice, count_X, jnp.cumsum(count_X) - count_X, rows)
        traffic, room = Traffic.of(count_X), hot.room(rows)
        layout = kernel.layout(jnp.sum(traffic.arriving_NE, axis=0), room)
        row_Q = traffic.rows_in(layout, room)
        x_QD = exchange(routes.to_slots(x_GSD)[0], traffic.size_NN, room, rows)
        x_RD, from_R = permuted(x_QD, row_Q, layout.rows)
        ids_R = None
        if key is not None and experts.dropout_rate > 0:
            ids_Q = move(routes.ids(ids_GS)[0][:, None], traffic.size_NN, room)[:, 0]
            ids_R = ids_Q.at[from_R].get(mode="fill", fill_value=0) * experts.num_experts
            ids_R += hot.numbered().at[layout.expert_R].get(mode="clip")
        y_RD = experts_on_rows(experts, x_RD, (layout, kernel), ids_R, key)
        y_QD, _ = permuted(y_RD, from_R, room)
        y_AD = exchange(y_QD, traffic.size_NN.T, rows, room)
        return routes.combine(y_AD[None]), decision.expert_GSK >= 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Traffic:
    """Who sends how much to whom. N: devices that share the experts, see `dispatch.replicas`.

    size_NN: rows from each device to each. arriving_NE: rows for the experts that this device computes, by sender.
    """

    size_NN: Int[Array, "N N"]
    arriving_NE: Int[Array, "N E"]

    @classmethod
    def of(cls, count_E: Int[Array, "E"]) -> Traffic:
        """count_E: rows that this device has for each expert of each device, in turn. All devices learn all counts."""
        devices = sharers(count_E.size)
        gather = functools.partial(jax.lax.all_gather, axis_name="expert", axis_index_groups=runs(devices))
        count_NE = gather(count_E) if devices > 1 else count_E[None]
        count_NNE = count_NE.reshape(devices, devices, -1)
        return cls(jnp.sum(count_NNE, axis=2), count_NNE[:, place(devices)])

    @property
    def devices(self) -> int:
        """Those that exchange."""
        return self.size_NN.shape[0]

    def rows_in(self, layout: Layout, room: int) -> Int[Array, "Q"]:
        """Where in the layout each of `room` received rows belongs; `layout.rows` for those that hold nothing.

        Received rows are sorted by sender, and those of a sender by expert; in the layout the expert comes first.
        """
        count_X, experts = self.arriving_NE.reshape(-1), self.arriving_NE.shape[1]
        earlier_NE = jnp.cumsum(self.arriving_NE, axis=0) - self.arriving_NE
        place_X = (layout.first_row_E + earlier_NE).reshape(-1)
        start_X = jnp.cumsum(count_X) - count_X
        part_Q = jnp.repeat(jnp.arange(self.devices * experts), count_X, total_repeat_length=room)
        row_Q = jnp.arange(room, dtype=jnp.int32)
        return jnp.where(row_Q < jnp.sum(count_X), place_X[part_Q] + row_Q - start_X[part_Q], layout.rows)
