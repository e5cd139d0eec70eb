"""Grouped products by `jax.lax.ragged_dot_general`, and by the function of tokamax that takes the same arguments."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util

import jax
import jax.numpy as jnp

from sparse_lm.moe.grouped.layout import Kernel, Layout


def _numbers(contracting: tuple[int, int], grouped: bool) -> jax.lax.RaggedDotDimensionNumbers:
    """contracting: the axis of x and of the other that is summed over. grouped: whether the other has an axis E."""
    left, right = contracting
    return jax.lax.RaggedDotDimensionNumbers((((left,), (right,)), ((), ())), [0], [0] if grouped else [])


@dataclasses.dataclass(frozen=True)
class RaggedDot(Kernel):
    """A kernel of the compiler's on TPU, but for `outer`, where every row meets every expert: E times the work.

    On CPU all of it is so, for tests only.
    """

    def layout(self, count_E, rows):
        """See `Kernel.layout`."""
        return Layout.of(count_E, 1, rows)

    def times(self, x_RA, w_EXY, layout, transpose):
        """See `Kernel.times`."""
        numbers = _numbers((1, 2 if transpose else 1), grouped=True)
        return layout.guarded(self._product(x_RA, w_EXY, layout.number_E, numbers).astype(x_RA.dtype))

    def outer(self, x_RD, dy_RF, layout, dtype):
        """See `Kernel.outer`."""
        return self._product(x_RD, dy_RF, layout.number_E, _numbers((0, 0), grouped=False)).astype(dtype)

    def _product(self, x, other, count_E, numbers) -> jax.Array:
        return jax.lax.ragged_dot_general(x, other, count_E, numbers, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Tokamax(RaggedDot):
    """The kernels of https://github.com/openxla/tokamax, which chooses one of its own for the device."""

    @property
    def checked(self):
        """See `Kernel.checked`: its Pallas calls do not declare which results differ between devices."""
        return False

    def refusal(self, platform):
        """See `Kernel.refusal`."""
        if importlib.util.find_spec("tokamax") is None:
            return "is not installed; run pip install tokamax, or use auto"
        return None

    def _product(self, x, other, count_E, numbers):
        tokamax = importlib.import_module("tokamax")
        return tokamax.ragged_dot_general(x, other, count_E, numbers, preferred_element_type=jnp.float32)
