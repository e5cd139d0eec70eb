"""Grouped products by the Pallas kernels for TPU that come with jax (`jax.experimental.pallas.ops.tpu.megablox`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from sparse_lm.moe.grouped.layout import Kernel, Layout, block_size

ROWS = (128, 256, 512)  # of a tile
WIDTHS = (512, 640, 768, 896, 1024)  # of a tile; a width that is less than the last is one tile
ON_CHIP = 29 * 2**19  # bytes for tiles: of the 16 MiB that a kernel gets by default, the masks take up to 1.5


def tile_width(width: int) -> int:
    """The tile that fills up a width with the fewest columns; the widest of several."""
    return width if width <= WIDTHS[-1] else min(WIDTHS, key=lambda tile: (-(-width // tile) * tile, -tile))


@dataclasses.dataclass(frozen=True)
class Megablox(Kernel):
    """interpret: runs the kernels step by step on any platform, for tests."""

    interpret: bool = False

    @property
    def checked(self):
        """See `Kernel.checked`: its Pallas calls do not declare which results differ between devices."""
        return False

    def refusal(self, platform):
        """See `Kernel.refusal`."""
        if platform == "tpu" or self.interpret:
            return None
        return f"has kernels for TPU and the device is a {platform}; use auto, or blocks"

    def layout(self, count_E, rows):
        """See `Kernel.layout`."""
        tile = block_size(ROWS, rows, count_E.shape[0])
        return Layout.of(count_E, 1, -(-rows // tile) * tile)

    def times(self, x_RA, w_EXY, layout, transpose):
        """See `Kernel.times`."""
        from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

        inner, width = w_EXY.shape[:0:-1] if transpose else w_EXY.shape[1:]
        left, right, size = tile_width(inner), tile_width(width), x_RA.dtype.itemsize

        def used(rows):  # two of each tile but the sum, so that one travels while the other is at work
            return 2 * size * (rows * left + left * right + rows * right) + 4 * rows * right

        tiling = _rows(layout, used), left, right
        options = {"tiling": tiling, "transpose_rhs": transpose, "interpret": self.interpret}
        return layout.guarded(gmm(x_RA, w_EXY, layout.number_E, x_RA.dtype, **options))

    def outer(self, x_RD, dy_RF, layout, dtype):
        """See `Kernel.outer`."""
        from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

        left, right, size = tile_width(x_RD.shape[1]), tile_width(dy_RF.shape[1]), x_RD.dtype.itemsize

        def used(rows):
            return 2 * size * rows * (left + right) + (4 + 2 * dtype.itemsize) * left * right

        tiling, x_DR = (_rows(layout, used), left, right), jnp.swapaxes(x_RD, 0, 1)
        return tgmm(x_DR, dy_RF, layout.number_E, dtype, tiling=tiling, interpret=self.interpret)


def _rows(layout: Layout, used: Callable[[int], int]) -> int:
    """The most rows of a tile that divide all and whose tiles have room on the chip. used: bytes that they take."""
    return max((size for size in ROWS if layout.total % size == 0 and used(size) <= ON_CHIP), default=ROWS[0])
