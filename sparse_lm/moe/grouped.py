"""Products of rows with the matrix of the expert that each row belongs to: no slot, no drop, hardly any padding.

Rows are sorted by expert, and every expert's rows fill whole blocks, so that a product is a loop over blocks that are
ordinary matrix products. The loop runs as often as there are blocks in use: work follows the loads, whatever they are.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_lm.sharding import varying

BLOCK = 256  # rows; a token batch that is small beside E blocks uses smaller ones, see `block_size`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """Which blocks of rows belong to which expert. first_E, number_E: the first block of each, and how many there are.

    size: rows of a block. total: number of blocks that there is room for; those in use come first.
    """

    first_E: Int[Array, "E"]
    number_E: Int[Array, "E"]
    size: int = dataclasses.field(metadata={"static": True})
    total: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, count_E: Int[Array, "E"], rows: int) -> Blocks:
        """count_E: rows of each expert, `rows` at most in all; so there is always room."""
        experts = count_E.shape[0]
        size = block_size(rows, experts)
        number_E = (count_E + size - 1) // size
        return cls(jnp.cumsum(number_E) - number_E, number_E, size, rows // size + experts)


def block_size(rows: int, experts: int) -> int:
    """`BLOCK`, or less where half-empty last blocks would be more than about a quarter of the work; at least 8."""
    size = BLOCK
    while size > 8 and 2 * size * experts > rows:
        size //= 2
    return size


@jax.custom_vjp
def grouped_product(x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], blocks: Blocks) -> Float[Array, "R F"]:
    """Each row times the matrix of its expert, accumulated in float32; rows of unused blocks are 0.

    R = blocks.total * blocks.size. A block of an expert holds rows of that expert, the empty ones among them zero.
    """
    return _times(x_RD, w_EDF, blocks, transpose=False)


def _forward(x_RD, w_EDF, blocks):
    return grouped_product(x_RD, w_EDF, blocks), (x_RD, w_EDF, blocks)


def _backward(saved, dy_RF):
    x_RD, w_EDF, blocks = saved
    return _times(dy_RF, w_EDF, blocks, transpose=True), _outer(x_RD, dy_RF, blocks).astype(w_EDF.dtype), None


grouped_product.defvjp(_forward, _backward)


def _times(x_RA: jax.Array, w_EXY: jax.Array, blocks: Blocks, transpose: bool) -> jax.Array:
    """Rows times matrices, or times their transposes."""
    inner, width = (1, w_EXY.shape[1]) if transpose else (0, w_EXY.shape[2])

    def of_expert(expert, y):
        # The matrix is read out once per expert and not once per block.
        w_XY = jax.lax.dynamic_index_in_dim(w_EXY, expert, keepdims=False)

        def of_block(number, y):
            start = (blocks.first_E[expert] + number) * blocks.size
            rows = jax.lax.dynamic_slice_in_dim(x_RA, start, blocks.size)
            product = jax.lax.dot_general(
                rows, w_XY, (((1,), (inner,)), ((), ())), preferred_element_type=jnp.float32
            ).astype(x_RA.dtype)
            return jax.lax.dynamic_update_slice_in_dim(y, product, start, 0)

        return jax.lax.fori_loop(0, blocks.number_E[expert], of_block, y)

    start = varying(jnp.zeros((x_RA.shape[0], width), x_RA.dtype))
    return jax.lax.fori_loop(0, w_EXY.shape[0], of_expert, start)


def _outer(x_RD: jax.Array, dy_RF: jax.Array, blocks: Blocks) -> jax.Array:
    """The gradient of the matrices, float32: for each expert the sum over its blocks of x^T dy."""
    experts = blocks.first_E.shape[0]

    def of_expert(expert, dw):
        def of_block(number, total):
            take = functools.partial(
                jax.lax.dynamic_slice_in_dim,
                start_index=(blocks.first_E[expert] + number) * blocks.size,
                slice_size=blocks.size,
            )
            outer = (((0,), (0,)), ((), ()))
            return total + jax.lax.dot_general(take(x_RD), take(dy_RF), outer, preferred_element_type=jnp.float32)

        zero = varying(jnp.zeros(dw.shape[1:], jnp.float32))
        total = jax.lax.fori_loop(0, blocks.number_E[expert], of_block, zero)
        return jax.lax.dynamic_update_index_in_dim(dw, total, expert, 0)

    start = varying(jnp.zeros((experts, x_RD.shape[1], dy_RF.shape[1]), jnp.float32))
    return jax.lax.fori_loop(0, experts, of_expert, start)
