"""Expert parallelism: experts stay on their devices, and an all-to-all over the `expert` axis moves the slots."""

from __future__ import annotations

import jax

from sparse_lm.mesh import manual_axis_size
from sparse_lm.moe.dispatch.base import Dispatcher, apply_experts
from sparse_lm.moe.dispatch.gather import Routes


class AllToAll(Dispatcher):
    """Like `Gather`, with two exchanges forward and two backward per layer; capacity is per group, so nothing grows."""

    moves_tokens = True

    def local(self, experts, x_GSD, decision, ids_GS, key):
        """See `Dispatcher.local`."""
        routes = Routes.of(decision, experts.num_experts, self.slots)
        x_ERD = _exchange(routes.to_slots(x_GSD), split=0, concat=1)
        ids_ER = None
        if key is not None and experts.dropout_rate > 0:
            ids_ER = _exchange(routes.ids(ids_GS), split=0, concat=1)
        y_ERD = _exchange(apply_experts(experts, x_ERD, ids_ER, key), split=1, concat=0)
        return routes.combine(y_ERD), routes.placement.slot_GSK >= 0


def _exchange(x: jax.Array, split: int, concat: int) -> jax.Array:
    """[E, R, ...]: own tokens for all experts <-> [E / devices, devices * R, ...]: all tokens for own experts."""
    if manual_axis_size("expert") == 1:
        return x
    return jax.lax.all_to_all(x, "expert", split_axis=split, concat_axis=concat, tiled=True)
