"""Grouped products as loops over blocks of rows that are ordinary matrix products: for CPUs, and right anywhere.

The loop runs as often as there are blocks in use: work follows the loads, whatever they are.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sparse_lm.mesh import varying
from sparse_lm.moe.grouped.layout import Kernel, Layout

BLOCK = 256  # rows; a token batch that is small beside E blocks uses smaller ones, see `block_size`


def block_size(rows: int, experts: int) -> int:
    """`BLOCK`, or less where half-empty last blocks would be more than about a quarter of the work; at least 8."""
    size = BLOCK
    while size > 8 and 2 * size * experts > rows:
        size //= 2
    return size


@dataclasses.dataclass(frozen=True)
class Blocks(Kernel):
    """Every expert's rows fill whole blocks, each of which meets one matrix."""

    def layout(self, count_E, rows):
        """See `Kernel.layout`."""
        experts = count_E.shape[0]
        size = block_size(rows, experts)
        return Layout.of(count_E, size, rows // size + experts)

    def times(self, x_RA, w_EXY, layout, transpose):
        """See `Kernel.times`."""
        inner, width = (1, w_EXY.shape[1]) if transpose else (0, w_EXY.shape[2])

        def of_expert(expert, y):
            # The matrix is read out once per expert and not once per block.
            w_XY = jax.lax.dynamic_index_in_dim(w_EXY, expert, keepdims=False)

            def of_block(number, y):
                start = (layout.first_E[expert] + number) * layout.size
                rows = jax.lax.dynamic_slice_in_dim(x_RA, start, layout.size)
                product = jax.lax.dot_general(
                    rows, w_XY, (((1,), (inner,)), ((), ())), preferred_element_type=jnp.float32
                ).astype(x_RA.dtype)
                return jax.lax.dynamic_update_slice_in_dim(y, product, start, 0)

            return jax.lax.fori_loop(0, layout.number_E[expert], of_block, y)

        start = varying(jnp.zeros((x_RA.shape[0], width), x_RA.dtype))
        return jax.lax.fori_loop(0, w_EXY.shape[0], of_expert, start)

    def outer(self, x_RD, dy_RF, layout):
        """See `Kernel.outer`."""
        experts = layout.first_E.shape[0]

        def of_expert(expert, dw):
            def of_block(number, total):
                take = functools.partial(
                    jax.lax.dynamic_slice_in_dim,
                    start_index=(layout.first_E[expert] + number) * layout.size,
                    slice_size=layout.size,
                )
                # CPUs sum over rows of bfloat16 slowly, see `sparse_lm.products`.
                x, dy = (take(one).astype(jnp.float32) for one in (x_RD, dy_RF))
                return total + jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())))

            zero = varying(jnp.zeros(dw.shape[1:], jnp.float32))
            total = jax.lax.fori_loop(0, layout.number_E[expert], of_block, zero)
            return jax.lax.dynamic_update_index_in_dim(dw, total, expert, 0)

        start = varying(jnp.zeros((experts, x_RD.shape[1], dy_RF.shape[1]), jnp.float32))
        return jax.lax.fori_loop(0, experts, of_expert, start)
