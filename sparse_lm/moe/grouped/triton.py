"""Grouped products by Pallas kernels for GPUs, which Triton compiles: every program makes one tile of the result.

All rows of a block belong to one expert, so that a program reads one tile of one matrix at a time, sums in float32,
writes its tile once, and shares nothing with the others. Triton wants tiles that are powers of two and at least 16.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from sparse_lm.mesh import shape_like
from sparse_lm.moe.grouped.layout import Kernel, Layout

ROWS = (16, 32, 64, 128)  # of a block
WIDTH = 128  # of a tile of the result, or the width if that is less
CAPABILITY = 8.0  # of NVIDIA GPUs, the least that Triton supports in XLA
OPTIONS = {"num_warps": 8, "num_stages": 3}  # threads of a program, in groups of 32; tiles under way at a time
SUMMED_BYTES = 128  # of each row of a tile that is summed over: a line of a GPU's cache


@dataclasses.dataclass(frozen=True)
class Triton(Kernel):
    """interpret: runs the kernels step by step on any platform, for tests.

    float32 operands are multiplied as TF32, as XLA does on such GPUs, unless `jax.default_matmul_precision` asks for
    more.
    """

    interpret: bool = False

    @property
    def checked(self):
        """See `Kernel.checked`: Pallas' interpreter loses count of what differs between devices."""
        return not self.interpret

    def refusal(self, platform):
        """See `Kernel.refusal`."""
        if self.interpret:
            return None
        if platform != "gpu":
            return f"has kernels for GPU and the device is a {platform}; use auto, or blocks"
        capability = getattr(jax.local_devices()[0], "compute_capability", "")  # "7.5"; of AMD's, a name without a dot
        if "." in capability and float(capability) < CAPABILITY:
            return f"needs compute capability {CAPABILITY} and this GPU has {capability}; use auto, or blocks"
        return None

    def layout(self, count_E, rows):
        """See `Kernel.layout`."""
        return Layout.in_blocks(ROWS, count_E, rows)

    def times(self, x_RA, w_EXY, layout, transpose):
        """See `Kernel.times`."""
        inner, outer = w_EXY.shape[:0:-1] if transpose else w_EXY.shape[1:]
        size, width, summed = layout.size, _tile(outer, WIDTH), _tile(inner, SUMMED_BYTES // x_RA.dtype.itemsize)

        def kernel(expert_of, steps_of, start_of, x_RA, w_EXY, y_RO):
            block = pl.program_id(1)
            expert = expert_of[block]
            rows = pl.ds(block * size, size)
            columns = pl.ds(pl.program_id(0) * width, width)

            def add(step, total):
                part = pl.ds(step * summed, summed)
                x = _load(x_RA.at[rows, part], (None, inner))
                if transpose:
                    return total + _dot(x, _load(w_EXY.at[expert, columns, part], (outer, inner)).T)
                return total + _dot(x, _load(w_EXY.at[expert, part, columns], (inner, outer)))

            start = jnp.full((size, width), start_of[block])
            total = jax.lax.fori_loop(0, steps_of[block], add, start)
            _store(y_RO.at[rows, columns], total.astype(y_RO.dtype), (None, outer))

        # As everywhere: 0 in what is not in use, and nothing but NaN where the counts do not fit.
        fits, in_use = layout.fits, jnp.arange(layout.total) < jnp.sum(layout.number_E)
        steps_of = jnp.where(fits & in_use, pl.cdiv(inner, summed), 0).astype(jnp.int32)
        start_of = jnp.where(fits, jnp.zeros(layout.total), jnp.nan)
        return self._call(
            kernel,
            shape_like(x_RA, (x_RA.shape[0], outer), x_RA.dtype),
            (pl.cdiv(outer, width), layout.total),
            (layout.expert_of_block, steps_of, start_of, x_RA, w_EXY),
        )

    def outer(self, x_RD, dy_RF, layout, dtype):
        """See `Kernel.outer`."""
        inner, outer = x_RD.shape[1], dy_RF.shape[1]
        down, across = _tile(inner, WIDTH), _tile(outer, WIDTH)
        summed = min(layout.size, SUMMED_BYTES // x_RD.dtype.itemsize)

        def kernel(first_E, steps_E, x_RD, dy_RF, dw_EDF):
            expert = pl.program_id(2)
            first = first_E[expert]
            here = pl.ds(pl.program_id(1) * down, down), pl.ds(pl.program_id(0) * across, across)

            def add(step, total):
                rows = pl.ds(first + step * summed, summed)
                x, dy = _load(x_RD.at[rows, here[0]], (None, inner)), _load(dy_RF.at[rows, here[1]], (None, outer))
                return total + _dot(x.T, dy)

            zeros = jnp.zeros((down, across), jnp.float32)
            total = jax.lax.fori_loop(0, steps_E[expert], add, zeros)
            _store(dw_EDF.at[expert, *here], total.astype(dtype), (inner, outer))

        experts = layout.first_E.shape[0]
        steps_E = jnp.where(layout.fits, layout.number_E * (layout.size // summed), 0)
        return self._call(
            kernel,
            shape_like(x_RD, (experts, inner, outer), dtype),
            (pl.cdiv(outer, across), pl.cdiv(inner, down), experts),
            (layout.first_row_E, steps_E, x_RD, dy_RF),
        )

    def _call(self, kernel, result: jax.ShapeDtypeStruct, grid: tuple[int, ...], operands: tuple) -> jax.Array:
        options = plt.CompilerParams(**OPTIONS)
        return pl.pallas_call(kernel, result, grid=grid, compiler_params=options, interpret=self.interpret)(*operands)


def _tile(width: int, most: int) -> int:
    """The power of two, from 16 to `most`, that holds a width or divides it into tiles."""
    return min(most, max(16, pl.next_power_of_2(width)))


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.dot(x, w, preferred_element_type=jnp.float32)


def _inside(tile, limits: tuple[int | None, int | None]) -> jax.Array | None:
    """Which of a tile's elements are within the array; None where all are. limits: of both axes, None for no end."""
    *_, rows, columns = tile.transforms[-1].indices
    mask = None
    for axis, (index, limit) in enumerate(zip((rows, columns), limits, strict=True)):
        if limit is not None and limit % index.size:
            ones = (index.size, 1) if axis == 0 else (1, index.size)
            inside = (index.start + jnp.arange(index.size) < limit).reshape(ones)
            mask = inside if mask is None else mask & inside
    return None if mask is None else jnp.broadcast_to(mask, (rows.size, columns.size))


def _load(tile, limits: tuple[int | None, int | None]) -> jax.Array:
    """A tile of two axes, 0 beyond the limits."""
    mask = _inside(tile, limits)
    return tile[...] if mask is None else plt.load(tile, mask=mask, other=0)


def _store(tile, value: jax.Array, limits: tuple[int | None, int | None]) -> None:
    """Writes what is within the limits."""
    plt.store(tile, value, mask=_inside(tile, limits))
