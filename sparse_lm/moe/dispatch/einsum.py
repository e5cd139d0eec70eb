"""Dispatch by tensors of shape [G, S, E, C] on both ways, which cost S x E x C x D products per group.

One-hot in GShard's dispatch; any weights in Soft MoE, which no other dispatcher can carry.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparse_lm.moe.dispatch.base import Dispatcher, apply_experts
from sparse_lm.moe.slots import place
from sparse_lm.moe.types import Soft


class Einsum(Dispatcher):
    """Source: Lepikhin et al. 2020 (GShard), algorithm 2."""

    def local(self, experts, x_GSD, decision, ids_GS, key):
        """See `Dispatcher.local`."""
        if isinstance(decision, Soft):
            return _soft(experts, x_GSD, decision, ids_GS, key)
        num_experts, slots = experts.num_experts, self.slots.capacity
        placement = place(decision, num_experts, self.slots)
        expert_GSKE = jax.nn.one_hot(decision.expert_GSK, num_experts, dtype=jnp.float32)
        slot_GSKC = jax.nn.one_hot(placement.slot_GSK, slots, dtype=jnp.float32)

        def weigh(gate_GSK):
            return jnp.einsum("GSK,GSKE,GSKC->GSEC", gate_GSK, expert_GSKE, slot_GSKC)

        if placement.scale_GSK is None:  # one-hot: exact in any dtype
            dispatch_GSEC = jnp.einsum("GSKE,GSKC->GSEC", expert_GSKE, slot_GSKC).astype(x_GSD.dtype)
        else:
            dispatch_GSEC = weigh(placement.scale_GSK)
        token_GEC = jnp.maximum(placement.token_GEC, 0)
        ids_GEC = jnp.take_along_axis(ids_GS, token_GEC.reshape(len(ids_GS), -1), axis=1).reshape(token_GEC.shape)
        y_GSD = _through(experts, x_GSD, (dispatch_GSEC, weigh(placement.gate_GSK)), ids_GEC, key)
        return y_GSD, placement.slot_GSK >= 0


def _soft(experts, x_GSD, decision: Soft, ids_GS, key):
    groups, size, num_experts, slots = decision.dispatch_GSEC.shape
    # Rows are numbered by the slots of the whole batch, since no token is in a row alone.
    ids_GC = ids_GS[:, :1] // size * slots + jnp.arange(slots, dtype=jnp.int32)
    ids_GEC = jnp.broadcast_to(ids_GC[:, None], (groups, num_experts, slots))
    real_GS1 = jnp.sum(decision.combine_GSEC, axis=(2, 3))[..., None] > 0
    kept_GSE = jnp.broadcast_to(real_GS1, (groups, size, num_experts))
    return _through(experts, x_GSD, (decision.dispatch_GSEC, decision.combine_GSEC), ids_GEC, key), kept_GSE


def _through(experts, x_GSD, weights, ids_GEC, key):
    """To the slots by the first weights, in their dtype, through the experts, and back by the second, in float32."""
    dispatch_GSEC, combine_GSEC = weights
    groups, num_experts, slots = ids_GEC.shape
    x_EGCD = jnp.einsum("GSEC,GSD->EGCD", dispatch_GSEC, x_GSD.astype(dispatch_GSEC.dtype)).astype(x_GSD.dtype)
    ids_ER = jnp.swapaxes(ids_GEC, 0, 1).reshape(num_experts, -1)
    y_ERD = apply_experts(experts, x_EGCD.reshape(num_experts, groups * slots, -1), ids_ER, key)
    return jnp.einsum("GSEC,EGCD->GSD", combine_GSEC, y_ERD.reshape(x_EGCD.shape).astype(jnp.float32))
