"""Sorted, capacity-padded dispatch: rows are gathered into slots and back. On a mesh the experts' weights move."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_lm.mesh import varying
from sparse_lm.moe.dispatch.base import Dispatcher, apply_experts
from sparse_lm.moe.slots import Placement, place


class Gather(Dispatcher):
    """Two gathers and one batched product per matrix; no tensor with both S and E x C as axes."""

    def local(self, experts, x_GSD, decision, ids_GS, key):
        """See `Dispatcher.local`."""
        routes = Routes.of(decision, experts.num_experts, self.slots)
        x_ERD = routes.to_slots(x_GSD)
        y_ERD = apply_experts(experts, x_ERD, routes.ids(ids_GS), key)
        return routes.combine(y_ERD), routes.placement.slot_GSK >= 0


class Routes:
    """The map between the tokens of a device and its slots, flat on both sides.

    token_ER: for each of an expert's R = G * C rows, the flat token (0..G*S-1), or G*S for an empty row.
    row_MK: for each flat token and choice, the flat row (0..E*R-1), or E*R for none.
    """

    def __init__(self, placement: Placement, row_MK: Int[Array, "M K"], token_ER: Int[Array, "E R"]):
        self.placement, self.row_MK, self.token_ER = placement, row_MK, token_ER

    @classmethod
    def of(cls, decision, num_experts: int, slots) -> Routes:
        """Places the decision and flattens the result."""
        placement = place(decision, num_experts, slots)
        groups, size, top_k = decision.expert_GSK.shape
        rows = groups * slots.capacity
        group_G = jnp.arange(groups, dtype=jnp.int32)
        row_GSK = decision.expert_GSK * rows + group_G[:, None, None] * slots.capacity + placement.slot_GSK
        row_GSK = jnp.where(placement.slot_GSK >= 0, row_GSK, num_experts * rows)
        token_GEC = jnp.where(
            placement.token_GEC >= 0, placement.token_GEC + group_G[:, None, None] * size, groups * size
        )
        token_ER = jnp.swapaxes(token_GEC, 0, 1).reshape(num_experts, rows)
        return cls(placement, row_GSK.reshape(groups * size, top_k), token_ER)

    def to_slots(self, x_GSD: Float[Array, "G S D"]) -> Float[Array, "E R D"]:
        """Each row's token, scaled by its gate where that is on the input; empty rows are zero."""
        x_ERD = _to_slots(varying(x_GSD).reshape(-1, x_GSD.shape[-1]), self.token_ER, self.row_MK)
        if self.placement.scale_GSK is None:
            return x_ERD
        scale_R = _by_row(varying(self.placement.scale_GSK), self.row_MK, self.token_ER.size)
        return (x_ERD * scale_R.reshape(*self.token_ER.shape, 1)).astype(x_GSD.dtype)

    def ids(self, ids_GS: Int[Array, "G S"]) -> Int[Array, "E R"]:
        """The number of each row's token."""
        return ids_GS.reshape(-1).at[self.token_ER].get(mode="fill", fill_value=0)

    def combine(self, y_ERD: Float[Array, "E R D"]) -> Float[Array, "G S D"]:
        """Each token's gated sum over its rows, in float32."""
        groups, size, top_k = self.placement.gate_GSK.shape
        flat = y_ERD.reshape(-1, y_ERD.shape[-1])
        y_MD = _combine(flat, varying(self.placement.gate_GSK).reshape(-1, top_k), self.token_ER, self.row_MK)
        return y_MD.reshape(groups, size, -1)


def permuted(x_QD: Float[Array, "Q D"], row_Q: Int[Array, "Q"], rows: int) -> tuple[jax.Array, jax.Array]:
    """Rows in another order [R, D], zero where none belongs, and for each the old row, or Q for none.

    row_Q: the new row of each, no two alike; R or more for none.
    """
    old_Q = jnp.arange(row_Q.size, dtype=jnp.int32)
    from_R = varying(jnp.full((rows,), row_Q.size, jnp.int32)).at[row_Q].set(varying(old_Q), mode="drop")
    return _to_slots(x_QD, from_R, row_Q[:, None]), from_R


def _by_row(value_GSK: jax.Array, row_MK: jax.Array, num_rows: int) -> jax.Array:
    """A number per assignment -> a number per row, 0 for empty rows."""
    empty = varying(jnp.zeros((num_rows,), jnp.float32))
    return empty.at[varying(row_MK).reshape(-1)].set(value_GSK.reshape(-1), mode="drop")


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="fill", fill_value=0)


# The transpose of a gather is a scatter-add, which is slow everywhere and serial on CPU. Since each row has at most one
# token and each token at most K rows, and both maps are known, both transposes are gathers too.


@jax.custom_vjp
def _to_slots(x_MD, token_ER, row_MK):
    return _rows(x_MD, token_ER)


def _to_slots_forward(x_MD, token_ER, row_MK):
    return _rows(x_MD, token_ER), row_MK


def _to_slots_backward(row_MK, dy_ERD):
    flat = dy_ERD.reshape(-1, dy_ERD.shape[-1])
    picked = [_rows(flat, row_MK[:, k]).astype(jnp.float32) for k in range(row_MK.shape[1])]
    return functools.reduce(jnp.add, picked).astype(dy_ERD.dtype), None, None


_to_slots.defvjp(_to_slots_forward, _to_slots_backward)


@jax.custom_vjp
def _combine(y_RD, gate_MK, token_ER, row_MK):
    picked = [gate_MK[:, k, None] * _rows(y_RD, row_MK[:, k]).astype(jnp.float32) for k in range(row_MK.shape[1])]
    return functools.reduce(jnp.add, picked)


def _combine_forward(y_RD, gate_MK, token_ER, row_MK):
    return _combine(y_RD, gate_MK, token_ER, row_MK), (y_RD, gate_MK, token_ER, row_MK)


def _combine_backward(saved, dy_MD):
    y_RD, gate_MK, token_ER, row_MK = saved
    num_rows, choices = y_RD.shape[0], range(row_MK.shape[1])
    dgate = [jnp.sum(dy_MD * _rows(y_RD, row_MK[:, k]).astype(jnp.float32), axis=-1) for k in choices]
    # The gate of each row, scattered as scalars: one number per row, where the rows themselves are gathered.
    gate_R = _by_row(gate_MK, row_MK, num_rows)
    dy_RD = gate_R[:, None] * _rows(dy_MD, token_ER.reshape(-1))
    return dy_RD.astype(y_RD.dtype), jnp.stack(dgate, axis=-1), None, None


_combine.defvjp(_combine_forward, _combine_backward)
