"""Expert parallelism: experts stay on their devices, and an all-to-all over the `expert` axis moves the slots."""

from __future__ import annotations

import jax

from sparse_lm.moe.dispatch.base import Dispatcher, apply_experts, in_chunks
from sparse_lm.moe.dispatch.gather import Routes
from sparse_lm.moe.dispatch.replicas import runs, sharers


class AllToAll(Dispatcher):
    """Like `Gather`, with two exchanges forward and two backward per layer; capacity is per group, so nothing grows.

    With `exchange_chunks` above 1 as many times two, each of a part of every expert's slots.
    """

    moves_tokens = True

    def local(self, experts, x_GSD, decision, ids_GS, key):
        """See `Dispatcher.local`."""
        routes = Routes.of(decision, experts.num_experts, self.slots)
        devices = sharers(experts.num_experts)
        ids_ER = routes.ids(ids_GS) if key is not None and experts.dropout_rate > 0 else None

        def through(inputs):
            x_ERD, ids_ER = jax.tree.map(lambda rows: _exchange(rows, devices, split=0, concat=1), inputs)
            return _exchange(apply_experts(experts, x_ERD, ids_ER, key), devices, split=1, concat=0)

        chunks = self.exchange_chunks if devices > 1 else 1
        y_ERD = in_chunks(through, (routes.to_slots(x_GSD), ids_ER), chunks)
        return routes.combine(y_ERD), routes.placement.slot_GSK >= 0


def _exchange(x: jax.Array, devices: int, split: int, concat: int) -> jax.Array:
    """[E, R, ...]: own tokens for all experts <-> [E / devices, devices * R, ...]: all tokens for own experts."""
    if devices == 1:
        return x
    axes = {"split_axis": split, "concat_axis": concat, "axis_index_groups": runs(devices)}
    return jax.lax.all_to_all(x, "expert", **axes, tiled=True)
