"""Nothing is dropped: assignments sorted by expert in blocks, as many as there are. On a mesh the weights move."""

from __future__ import annotations

import jax.numpy as jnp

from sparse_lm.moe.dispatch.base import Dispatcher
from sparse_lm.moe.dispatch.gather import Routes
from sparse_lm.moe.grouped import Blocks, grouped_product
from sparse_lm.moe.slots import Placement
from sparse_lm.sharding import varying


class Dropless(Dispatcher):
    """Work follows the loads: no capacity, at most a block of padding per expert (MegaBlocks: Gale et al. 2022)."""

    def local(self, experts, x_GSD, decision, ids_GS, key):
        """See `Dispatcher.local`."""
        num_experts = experts.num_experts
        groups, size, top_k = decision.expert_GSK.shape
        tokens = groups * size
        expert_A = jnp.where(decision.expert_GSK < 0, num_experts, decision.expert_GSK).reshape(-1)
        count_E = jnp.sum(expert_A[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
        blocks = Blocks.of(count_E, tokens * top_k)
        rows = blocks.total * blocks.size
        order_A = jnp.argsort(expert_A, stable=True)
        start_E = jnp.cumsum(count_E) - count_E
        rank_A = jnp.zeros_like(expert_A).at[order_A].set(jnp.arange(tokens * top_k, dtype=jnp.int32))
        own_A = jnp.minimum(expert_A, num_experts - 1)
        row_A = jnp.where(
            expert_A < num_experts, blocks.first_E[own_A] * blocks.size + rank_A - start_E[own_A], rows
        ).astype(jnp.int32)
        token_R = jnp.full((rows,), tokens, jnp.int32)
        token_R = token_R.at[row_A].set(jnp.arange(tokens * top_k, dtype=jnp.int32) // top_k, mode="drop")
        kept_GSK = decision.expert_GSK >= 0
        # All are kept: slots and their tokens mean nothing here, only what multiplies where.
        slot_GSK, none_GEC = jnp.where(kept_GSK, 0, -1).astype(jnp.int32), jnp.zeros((groups, 0, 0), jnp.int32)
        placement = Placement.of(decision, slot_GSK, decision.gate_GSK, none_GEC)
        routes = Routes(placement, row_A.reshape(tokens, top_k), token_R[None])
        x_RD = routes.to_slots(x_GSD)[0]
        block_R = jnp.arange(rows, dtype=jnp.int32) // blocks.size
        expert_R = jnp.sum(block_R[:, None] >= (blocks.first_E + blocks.number_E)[None], axis=1, dtype=jnp.int32)
        expert_R = jnp.minimum(expert_R, num_experts - 1)
        ids_R = routes.ids(ids_GS)[0] * num_experts + expert_R if key is not None else None
        y_RD = experts.on_rows(
            x_RD,
            lambda x, w_EAB: grouped_product(varying(x), varying(w_EAB), blocks),
            lambda bias_EA: bias_EA[expert_R],
            ids_R,
            key,
        )
        return routes.combine(y_RD[None]), kept_GSK
