"""Grouped products as loops over blocks of rows that are ordinary matrix products: for CPUs, and right anywhere.

The loops run as often as there are blocks in use: work follows the loads, whatever they are. Neighbouring blocks of an
expert are multiplied together, as the binary digits of their number say: blocks can be small, products need not be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparse_lm.mesh import varying
from sparse_lm.moe.grouped.layout import Kernel, Layout
from sparse_lm.products import einsum

SIZES = (8, 16, 32)  # rows of a block
LARGEST = (128, 1024)  # rows of the largest product, at least and at most; powers of two, see `most_together`


def most_together(layout: Layout) -> int:
    """Blocks of the largest product: an expert's where loads are even, a power of two, and within `LARGEST`.

    Each power of two up to it is a product of its own in the program.
    """
    fewest, most = (rows // layout.size for rows in LARGEST)
    even = layout.total // layout.first_E.shape[0]
    together = min(max(even, fewest), most, layout.total)  # and no product has more rows than there are
    return 1 << together.bit_length() - 1


@dataclasses.dataclass(frozen=True)
class Blocks(Kernel):
    """Every expert's rows fill whole blocks, each of which meets one matrix."""

    def layout(self, count_E, rows):
        """See `Kernel.layout`."""
        return Layout.in_blocks(SIZES, count_E, rows)

    def times(self, x_RA, w_EXY, layout, transpose):
        """See `Kernel.times`."""
        inner, width = (1, w_EXY.shape[1]) if transpose else (0, w_EXY.shape[2])
        x_RA, dtype = _bits(x_RA), x_RA.dtype

        def of_expert(expert, y):
            # The matrix is read out once per expert and not once per block.
            w_XY = _values(jax.lax.dynamic_index_in_dim(_bits(w_EXY), expert, keepdims=False), w_EXY.dtype)

            def of_rows(start, size, y):
                rows = _values(jax.lax.dynamic_slice_in_dim(x_RA, start, size), dtype)
                product = jax.lax.dot_general(
                    rows, w_XY, (((1,), (inner,)), ((), ())), preferred_element_type=jnp.float32
                ).astype(dtype)
                return jax.lax.dynamic_update_slice_in_dim(y, _bits(product), start, 0)

            return _over_rows(of_rows, expert, layout, y)

        # What no block is written over stays as it was: the same as `Layout.guarded`, without going over all rows.
        nothing = jnp.where(layout.fits, 0.0, jnp.nan).astype(dtype)
        start = varying(_bits(jnp.broadcast_to(nothing, (x_RA.shape[0], width))))
        return _values(jax.lax.fori_loop(0, w_EXY.shape[0], of_expert, start), dtype)

    def outer(self, x_RD, dy_RF, layout, dtype):
        """See `Kernel.outer`."""
        experts, bits = layout.first_E.shape[0], (_bits(x_RD), _bits(dy_RF))

        def of_expert(expert, dw):
            def of_rows(start, size, total):
                slices = (jax.lax.dynamic_slice_in_dim(one, start, size) for one in bits)
                x, dy = (_values(one, x_RD.dtype) for one in slices)
                return total + einsum("RD,RF->DF", x, dy, dtype=jnp.float32)

            total = _over_rows(of_rows, expert, layout, varying(jnp.zeros(dw.shape[1:], jnp.float32)))
            return jax.lax.dynamic_update_index_in_dim(dw, total, expert, 0)

        start = varying(jnp.zeros((experts, x_RD.shape[1], dy_RF.shape[1]), jnp.float32))
        return jax.lax.fori_loop(0, experts, of_expert, start).astype(dtype)


def _over_rows(of_rows: Callable[[jax.Array, int, Any], Any], expert: jax.Array, layout: Layout, carry: Any) -> Any:
    """`carry = of_rows(first row, number of rows, carry)` over all blocks of an expert, several of them at a time."""
    number = jnp.where(layout.fits, layout.number_E[expert], 0)
    done = jnp.zeros_like(number)
    most = together = most_together(layout)
    while together:
        times = number // together if together == most else number // together % 2

        def body(turn, carry, done=done, together=together):
            start = (layout.first_E[expert] + done + turn * together) * layout.size
            return of_rows(start, together * layout.size, carry)

        carry = jax.lax.fori_loop(0, times, body, carry)
        done = done + times * together
        together //= 2
    return carry


def _bits(x: jax.Array) -> jax.Array:
    """bfloat16 as integers: on CPU XLA turns all of a bfloat16 array to float32 and back to write a slice of it."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _values(bits: jax.Array, dtype) -> jax.Array:
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)
