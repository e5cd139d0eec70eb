"""Grouped products by the Pallas kernels for TPU that come with jax (`jax.experimental.pallas.ops.tpu.megablox`)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from sparse_lm.moe.grouped.layout import Kernel, Layout

ROWS, WIDTH = 128, 512  # of a tile; a width that is less is one tile


@dataclasses.dataclass(frozen=True)
class Megablox(Kernel):
    """interpret: runs the kernels step by step on any platform, for tests."""

    interpret: bool = False

    checked = False  # its Pallas calls do not declare which results differ between devices

    def refusal(self, platform):
        """See `Kernel.refusal`."""
        if platform == "tpu" or self.interpret:
            return None
        return f"has kernels for TPU and the device is a {platform}; use auto, or blocks"

    def layout(self, count_E, rows):
        """See `Kernel.layout`."""
        return Layout.of(count_E, 1, -(-rows // ROWS) * ROWS)

    def times(self, x_RA, w_EXY, layout, transpose):
        """See `Kernel.times`."""
        from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

        inner, width = w_EXY.shape[:0:-1] if transpose else w_EXY.shape[1:]
        tiling = (ROWS, min(inner, WIDTH), min(width, WIDTH))
        options = {"tiling": tiling, "transpose_rhs": transpose, "interpret": self.interpret}
        return layout.guarded(gmm(x_RA, w_EXY, layout.number_E, x_RA.dtype, **options))

    def outer(self, x_RD, dy_RF, layout):
        """See `Kernel.outer`."""
        from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

        tiling = (ROWS, min(x_RD.shape[1], WIDTH), min(dy_RF.shape[1], WIDTH))
        x_DR = jnp.swapaxes(x_RD, 0, 1)
        return tgmm(x_DR, dy_RF, layout.number_E, jnp.float32, tiling=tiling, interpret=self.interpret)
