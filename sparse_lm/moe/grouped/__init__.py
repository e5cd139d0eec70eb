"""Products of rows with the matrix of the expert that each row belongs to: no slot, no drop, hardly any padding.

Rows are sorted by expert. One function computes forward and backward, by one of several kernels: see `KERNELS`.
"""

from __future__ import annotations

from typing import Literal

from sparse_lm.config import ConfigError
from sparse_lm.moe.grouped.blocks import Blocks
from sparse_lm.moe.grouped.layout import Kernel, Layout, before, grouped_product
from sparse_lm.moe.grouped.megablox import Megablox
from sparse_lm.moe.grouped.ragged import RaggedDot, Tokamax
from sparse_lm.moe.grouped.triton import Triton

__all__ = ["KERNELS", "Grouped", "Kernel", "Layout", "before", "grouped_product", "kernel_of"]

Grouped = Literal["auto", "blocks", "ragged_dot", "megablox", "triton", "tokamax"]

KERNELS: dict[str, Kernel] = {
    "blocks": Blocks(),
    "ragged_dot": RaggedDot(),
    "megablox": Megablox(),
    "triton": Triton(),
    "tokamax": Tokamax(),
}
# XLA for TPU computes a gradient of `ragged_dot` for all rows and every expert: E times the work (docs/design.md).
AUTO = {"cpu": ("blocks",), "gpu": ("triton", "blocks"), "tpu": ("megablox",)}


def kernel_of(name: Grouped, platform: str) -> Kernel:
    """The kernel of this name; `auto` is `blocks` on CPU, `megablox` on TPU, and `triton` on GPUs that it supports.

    platform: `cpu`, `gpu` or `tpu`. Raises `ConfigError` where the kernel cannot run on it.
    """
    if name == "auto":
        return next(KERNELS[one] for one in AUTO[platform] if KERNELS[one].refusal(platform) is None)
    refusal = KERNELS[name].refusal(platform)
    if refusal is not None:
        raise ConfigError("model.moe.grouped", name, refusal)
    return KERNELS[name]
