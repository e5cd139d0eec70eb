"""How fast the devices could be at best, to say which share of it a run reaches (MFU)."""

from __future__ import annotations

import dataclasses
import functools
import re
import statistics
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from sparse_lm.mesh import make_mesh
from sparse_lm.products import einsum

# Dense bfloat16 FLOP/s of one device as its vendor states it, sparsity not counted. A pattern matches the whole
# `device_kind`; other forms of the same chip (H100 PCIe, H100 NVL) are slower, match nothing, and are measured.
PUBLISHED = (
    (r"TPU v4", 275e12),
    (r"TPU v5 ?(lite|e)", 197e12),
    (r"TPU v5p?", 459e12),
    (r"TPU v6 ?(lite|e)", 918e12),
    (r"NVIDIA A100.*", 312e12),
    (r"NVIDIA H100 \d+GB HBM3", 989e12),
    (r"NVIDIA H200", 989e12),
)
SMALLEST, LARGEST = 512, 8192
LONG_ENOUGH = 0.02  # seconds that a product should take, so that starting it does not count
MOST = 50  # products that are timed


@dataclasses.dataclass(frozen=True)
class Peak:
    """FLOP/s of one device. source: `published` by the vendor, or `measured` with large matrix products."""

    flops_per_second: float
    source: Literal["measured", "published"]
    device_kind: str


def device_peak(dtype: str = "float32") -> Peak:
    """The peak of the default device: the published bfloat16 one where it is known, else as measured in `dtype`.

    Published peaks are those of bfloat16 whatever `dtype` is, since that is what MFU means in the literature.
    """
    kind = jax.local_devices()[0].device_kind
    published = published_peak(kind)
    if published is not None:
        return Peak(published, "published", kind)
    return Peak(matmul_peak(dtype), "measured", kind)


def published_peak(device_kind: str) -> float | None:
    """The vendor's dense bfloat16 FLOP/s for a `device_kind` as jax spells it; None when it is not in the table."""
    return next((peak for pattern, peak in PUBLISHED if re.fullmatch(pattern, device_kind)), None)


def matmul_peak(dtype: str = "float32", seconds: float = 0.3, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOP/s of a square matrix product on the default device: the median of as many as fit into about `seconds`.

    The matrices grow until a product takes 20 ms. On a host whose cores are busy this is what is left of them: measure
    while nothing else runs. A mesh that is set plays no part. Raises `ValueError` when `seconds` is not above 0.
    """
    if seconds <= 0:
        raise ValueError(f"seconds={seconds}: must be above 0; the default is 0.3")
    with jax.set_mesh(make_mesh({}, jax.local_devices()[:1])):
        size = SMALLEST
        timed = _product(size, dtype, clock)
        once = timed()
        while once < LONG_ENOUGH and size < LARGEST:
            size *= 2
            timed = _product(size, dtype, clock)
            once = timed()
        repeats = min(MOST, max(2, int(seconds / max(once, 1e-9))))
        times = [once, *(timed() for _ in range(repeats))]
    return 2 * size**3 / statistics.median(times)


def _product(size: int, dtype: str, clock: Callable[[], float]) -> Callable[[], float]:
    """Multiplies two matrices of this size, compiled, and returns the seconds that it took."""
    x = jnp.full((size, size), 1 / size, dtype)
    product = jax.jit(functools.partial(einsum, "MK,KN->MN")).lower(x, x).compile()  # in the form that layers use
    jax.block_until_ready(product(x, x))  # the first call is slower

    def timed() -> float:
        start = clock()
        jax.block_until_ready(product(x, x))
        return clock() - start

    return timed


def mfu(tokens_per_second: float, flops_per_token: float, peak: Peak, devices: int) -> float:
    """Model FLOPs utilisation: the share of all devices' peak that goes into the model's own FLOPs.

    flops_per_token: of training, without recomputation (see `models.counts`). Source: PaLM (Chowdhery et al. 2022),
    appendix B.
    """
    return tokens_per_second * flops_per_token / (peak.flops_per_second * devices)
