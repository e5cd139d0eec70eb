"""Where the rows of every expert lie, and the product of all rows with the matrices of their experts."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int


def before(size: jax.Array, axis: int = 0) -> jax.Array:
    """Sums of what stands before along an axis."""
    return jnp.cumsum(size, axis=axis, dtype=size.dtype) - size


def block_size(sizes: Sequence[int], rows: int, experts: int) -> int:
    """The largest of the sizes of which one for every expert is a quarter of the rows at most; else the smallest.

    Half-empty last blocks are then about an eighth of the work, and tiles that neighbours share about a quarter.
    """
    return max((size for size in sizes if 4 * size * experts <= rows), default=min(sizes))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Rows sorted by expert, each expert's in whole blocks of `size` rows; with size 1 they lie side by side.

    first_E, number_E: the first block of each expert, and how many there are. total: number of blocks that there is
    room for; those in use come first.
    """

    first_E: Int[Array, "E"]
    number_E: Int[Array, "E"]
    size: int = dataclasses.field(metadata={"static": True})
    total: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, count_E: Int[Array, "E"], size: int, total: int) -> Layout:
        """count_E: rows of each expert. Raises `ValueError` where known counts are negative or have no room.

        Counts that are known at run time only cannot raise: products of what has no room are NaN, see `fits`.
        """
        number_E = jnp.where(count_E < 0, count_E, (count_E + size - 1) // size)
        layout = cls(before(number_E), number_E, size, total)
        if not isinstance(layout.fits, Tracer) and not bool(layout.fits):
            raise ValueError(
                f"rows per expert {count_E.tolist()} do not fit in {total} blocks of {size} rows; "
                "count what is there, or make the layout for more rows"
            )
        return layout

    @classmethod
    def in_blocks(cls, sizes: Sequence[int], count_E: Int[Array, "E"], rows: int) -> Layout:
        """Each expert's rows in whole blocks, of the size that suits up to `rows` in all, with room for any counts."""
        experts = count_E.shape[0]
        size = block_size(sizes, rows, experts)
        return cls.of(count_E, size, rows // size + experts)

    @property
    def rows(self) -> int:
        """R: rows that there is room for."""
        return self.total * self.size

    @property
    def first_row_E(self) -> Int[Array, "E"]:
        """The first row of each expert."""
        return self.first_E * self.size

    @property
    def used(self) -> Int[Array, ""]:
        """Rows of blocks in use."""
        return jnp.sum(self.number_E) * self.size

    @property
    def fits(self) -> Bool[Array, ""]:
        """Whether no count is negative and all blocks have room."""
        return jnp.all(self.number_E >= 0) & (self.used <= self.rows)

    def guarded(self, y_RF: jax.Array) -> jax.Array:
        """0 in rows that are not in use, and NaN everywhere where the counts do not fit."""
        used_R1 = (jnp.arange(self.rows) < self.used)[:, None]
        other = jnp.where(self.fits, 0.0, jnp.nan).astype(y_RF.dtype)
        return jnp.where(used_R1 & self.fits, y_RF, other)

    @property
    def expert_of_block(self) -> jax.Array:
        """The expert of each block; the last one for blocks that are not in use."""
        end_E = self.first_E + self.number_E
        before_it = jnp.arange(self.total)[:, None] >= end_E
        return jnp.minimum(jnp.sum(before_it, axis=1, dtype=jnp.int32), end_E.shape[0] - 1)

    @property
    def expert_R(self) -> Int[Array, "R"]:
        """The expert of each row."""
        return jnp.repeat(self.expert_of_block, self.size, total_repeat_length=self.rows)


@dataclasses.dataclass(frozen=True)
class Kernel(abc.ABC):
    """One way to compute grouped products."""

    @property
    def checked(self) -> bool:
        """Whether the `shard_map` around it can check which results differ between devices (`check_vma`)."""
        return True

    def refusal(self, platform: str) -> str | None:
        """Why it cannot run on `cpu`, `gpu` or `tpu`; None if it can."""
        return None

    @abc.abstractmethod
    def layout(self, count_E: Int[Array, "E"], rows: int) -> Layout:
        """The layout that it wants for these counts, of which there are `rows` at most in all."""

    @abc.abstractmethod
    def times(self, x_RA: jax.Array, w_EXY: jax.Array, layout: Layout, transpose: bool) -> jax.Array:
        """Rows times the matrices of their experts, or times their transposes; summed in float32, in x's dtype.

        Rows of an expert that are zero give zero, and so do rows that are not in use, whatever is in them. A layout
        without room for its own counts gives NaN everywhere.
        """

    @abc.abstractmethod
    def outer(self, x_RD: jax.Array, dy_RF: jax.Array, layout: Layout, dtype: jnp.dtype) -> jax.Array:
        """The gradient of the matrices [E, D, F]: for each expert the sum over its rows of x^T dy.

        Summed in float32. dtype: of the result.
        """


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_product(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], layout: Layout, kernel: Kernel
) -> Float[Array, "R F"]:
    """Each row times the matrix of its expert, accumulated in float32; rows that are not in use are 0.

    Between the rows of an expert and the end of its last block x has to be 0. A layout without room for its own counts
    gives NaN everywhere: no kernel says so by itself, and what it would compute looks like any other number.
    """
    return kernel.times(x_RD, w_EDF, layout, transpose=False)


def _forward(x_RD, w_EDF, layout, kernel):
    return grouped_product(x_RD, w_EDF, layout, kernel), (x_RD, w_EDF, layout)


def _backward(kernel, saved, dy_RF):
    x_RD, w_EDF, layout = saved
    dx_RD = kernel.times(dy_RF, w_EDF, layout, transpose=True)
    return dx_RD, kernel.outer(x_RD, dy_RF, layout, w_EDF.dtype), None


grouped_product.defvjp(_forward, _backward)
