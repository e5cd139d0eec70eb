"""The oracle: every expert computes every token, and the gates choose. Slow and obvious."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparse_lm.moe.dispatch.base import Dispatcher, apply_experts
from sparse_lm.moe.slots import place


class Dense(Dispatcher):
    """E times the work of a dense layer; respects capacity by giving dropped assignments the gate 0."""

    def local(self, experts, x_GSD, decision, ids_GS, key):
        """See `Dispatcher.local`."""
        groups, size, width = x_GSD.shape
        num_experts = experts.num_experts
        placement = place(decision, num_experts, self.slots)
        x_ERD = jnp.broadcast_to(x_GSD.reshape(1, groups * size, width), (num_experts, groups * size, width))
        ids_ER = jnp.broadcast_to(ids_GS.reshape(1, -1), x_ERD.shape[:2])
        chosen_GSKE = jax.nn.one_hot(decision.expert_GSK, num_experts, dtype=jnp.float32)
        if placement.scale_GSK is not None:
            scale_EGS = jnp.einsum("GSK,GSKE->EGS", placement.scale_GSK, chosen_GSKE)
            x_ERD = (x_ERD * scale_EGS.reshape(num_experts, -1, 1)).astype(x_GSD.dtype)
        y_EGSD = apply_experts(experts, x_ERD, ids_ER, key).reshape(num_experts, groups, size, width)
        weight_GSE = jnp.einsum("GSK,GSKE->GSE", placement.gate_GSK, chosen_GSKE)
        y_GSD = jnp.einsum("GSE,EGSD->GSD", weight_GSE, y_EGSD.astype(jnp.float32))
        return y_GSD, placement.slot_GSK >= 0
