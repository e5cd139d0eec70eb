"""Nothing is dropped: assignments sorted by expert, as many as there are. On a mesh the weights move."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_lm.mesh import varying
from sparse_lm.moe.dispatch.base import Dispatcher
from sparse_lm.moe.dispatch.gather import Routes
from sparse_lm.moe.experts import Experts
from sparse_lm.moe.grouped import Kernel, Layout, before, grouped_product
from sparse_lm.moe.slots import Placement
from sparse_lm.moe.types import TokenChoice


class Dropless(Dispatcher):
    """Work follows the loads: no capacity, at most a block of padding per expert (MegaBlocks: Gale et al. 2022)."""

    has_capacity = False

    def local(self, experts, x_GSD, decision, ids_GS, key):
        """See `Dispatcher.local`."""
        num_experts = experts.num_experts
        count_E = loads(decision, num_experts)
        layout = self.kernel.layout(count_E, decision.expert_GSK.size)
        routes = sorted_routes(decision, count_E, layout.first_row_E, layout.rows)
        ids_R = None
        if key is not None and experts.dropout_rate > 0:
            ids_R = routes.ids(ids_GS)[0] * num_experts + layout.expert_R
        y_RD = experts_on_rows(experts, routes.to_slots(x_GSD)[0], (layout, self.kernel), ids_R, key)
        return routes.combine(y_RD[None]), decision.expert_GSK >= 0


def loads(decision: TokenChoice, num_experts: int) -> Int[Array, "E"]:
    """Assignments of each expert."""
    expert_A = decision.expert_GSK.reshape(-1)
    return jnp.sum(expert_A[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)


def sorted_routes(decision: TokenChoice, count_E: Int[Array, "E"], first_row_E: Int[Array, "E"], rows: int) -> Routes:
    """Every assignment in one of R rows: those of an expert by token, from its first row on. count_E: see `loads`."""
    groups, size, top_k = decision.expert_GSK.shape
    tokens, num_experts = groups * size, count_E.shape[0]
    expert_A = jnp.where(decision.expert_GSK < 0, num_experts, decision.expert_GSK).reshape(-1)
    start_E = before(count_E)
    order_A = jnp.argsort(expert_A, stable=True)
    rank_A = jnp.zeros_like(expert_A).at[order_A].set(jnp.arange(tokens * top_k, dtype=jnp.int32))
    own_A = jnp.minimum(expert_A, num_experts - 1)
    row_A = jnp.where(expert_A < num_experts, first_row_E[own_A] + rank_A - start_E[own_A], rows).astype(jnp.int32)
    token_R = jnp.full((rows,), tokens, jnp.int32)
    token_R = token_R.at[row_A].set(jnp.arange(tokens * top_k, dtype=jnp.int32) // top_k, mode="drop")
    # All are kept: slots and their tokens mean nothing here, only what multiplies where.
    slot_GSK = jnp.where(decision.expert_GSK >= 0, 0, -1).astype(jnp.int32)
    placement = Placement.of(decision, slot_GSK, decision.gate_GSK, jnp.zeros((groups, 0, 0), jnp.int32))
    return Routes(placement, row_A.reshape(tokens, top_k), token_R[None])


def experts_on_rows(
    experts: Experts,
    x_RD: Float[Array, "R D"],
    how: tuple[Layout, Kernel],
    ids_R: Int[Array, "R"] | None,
    key: jax.Array | None,
) -> Float[Array, "R D"]:
    """The experts in memory on rows that lie as the layout says. ids_R: a number per row, for dropout."""
    layout, kernel = how
    return experts.on_rows(
        x_RD,
        lambda x, w_EAB: grouped_product(varying(x), varying(w_EAB), layout, kernel),
        lambda bias_EA: bias_EA[layout.expert_R],
        ids_R,
        key,
    )
