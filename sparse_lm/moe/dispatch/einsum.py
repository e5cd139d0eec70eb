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
        groups, _, width = x_GSD.shape
        num_experts, slots = experts.num_experts, self.slots.capacity
        placement = place(decision, num_experts, self.slots)
        expert_GSKE = jax.nn.one_hot(decision.expert_GSK, num_experts, dtype=jnp.float32)
        slot_GSKC = jax.nn.one_hot(placement.slot_GSK, slots, dtype=jnp.float32)
        dispatch_GSEC = jnp.einsum("GSKE,GSKC->GSEC", expert_GSKE, slot_GSKC)
        combine_GSEC = jnp.einsum("GSK,GSKE,GSKC->GSEC", placement.gate_GSK, expert_GSKE, slot_GSKC)
        if placement.scale_GSK is None:
            x_EGCD = jnp.einsum("GSEC,GSD->EGCD", dispatch_GSEC.astype(x_GSD.dtype), x_GSD)
        else:
            scaled_GSEC = jnp.einsum("GSK,GSKE,GSKC->GSEC", placement.scale_GSK, expert_GSKE, slot_GSKC)
            x_EGCD = jnp.einsum("GSEC,GSD->EGCD", scaled_GSEC, x_GSD.astype(jnp.float32)).astype(x_GSD.dtype)
        token_GEC = jnp.maximum(placement.token_GEC, 0)
        ids_GEC = jnp.take_along_axis(ids_GS, token_GEC.reshape(groups, -1), axis=1).reshape(token_GEC.shape)
        ids_ER = jnp.swapaxes(ids_GEC, 0, 1).reshape(num_experts, -1)
        y_ERD = apply_experts(experts, x_EGCD.reshape(num_experts, groups * slots, width), ids_ER, key)
        y_EGCD = y_ERD.reshape(x_EGCD.shape).astype(jnp.float32)
        return jnp.einsum("GSEC,EGCD->GSD", combine_GSEC, y_EGCD), placement.slot_GSK >= 0


def _soft(experts, x_GSD, decision: Soft, ids_GS, key):
    groups, size, width = x_GSD.shape
    num_experts, slots = decision.dispatch_GSEC.shape[2:]
    x_EGCD = jnp.einsum("GSEC,GSD->EGCD", decision.dispatch_GSEC, x_GSD.astype(jnp.float32)).astype(x_GSD.dtype)
    # Rows are numbered by the slots of the whole batch, since no token is in a row alone.
    ids_GC = ids_GS[:, :1] // size * slots + jnp.arange(slots, dtype=jnp.int32)
    ids_ER = jnp.broadcast_to(ids_GC.reshape(1, -1), (num_experts, groups * slots))
    y_ERD = apply_experts(experts, x_EGCD.reshape(num_experts, groups * slots, width), ids_ER, key)
    y_EGCD = y_ERD.reshape(x_EGCD.shape).astype(jnp.float32)
    real_GS1 = jnp.sum(decision.combine_GSEC, axis=(2, 3))[..., None] > 0
    kept_GSE = jnp.broadcast_to(real_GS1, (groups, size, num_experts))
    return jnp.einsum("GSEC,EGCD->GSD", decision.combine_GSEC, y_EGCD), kept_GSE
