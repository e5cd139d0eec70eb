"""The sparse layer with ever more experts at the same useful FLOPs: where its cost grows, and what the limit says.

An expert stays as wide and a token sees as many, so that only the weights grow. The limit of a call is the larger of
two times: its products at the peak of the matrix product, and its weights' way through memory at the speed of a copy.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparse_lm.bench.harness import Drawn, Options, Paired, paired
from sparse_lm.bench.layers import Case, Sizes, time_sparse, useful_flops
from sparse_lm.config import ConfigError
from sparse_lm.mesh import make_mesh
from sparse_lm.telemetry.format import compact
from sparse_lm.telemetry.peak import matmul_peak

REPEATS, QUICK_REPEATS = 5, 1
FULL = Sizes(d_model=256, d_ff=1024)  # 512 experts then have 0.5 GB of weights, and as many bytes of gradients
QUICK = Sizes(tokens=256, group=128, d_model=32, d_ff=64)
COUNTS, QUICK_COUNTS = (8, 32, 128, 512), (8, 16)
TOP_K = 2
DISPATCHERS = ("dropless", "gather")
COPIED = 1 << 28  # bytes: far more than any cache holds
COPIES = 5


@dataclasses.dataclass(frozen=True)
class Limit:
    """What a call needs at least. flops: useful ones. bytes: of weights read and gradients written.

    peak: FLOP/s, bandwidth: bytes/s, both measured in the same run.
    """

    flops: float
    bytes: float
    peak: float
    bandwidth: float

    @property
    def compute(self) -> float:
        """Seconds of the products alone."""
        return self.flops / self.peak

    @property
    def memory(self) -> float:
        """Seconds of the weights' way through memory alone."""
        return self.bytes / self.bandwidth

    @property
    def seconds(self) -> float:
        """The larger of the two: one can hide behind the other at best."""
        return max(self.compute, self.memory)


@dataclasses.dataclass(frozen=True)
class Scaled:
    """One row: a number of experts against the smallest of the same dispatcher, in turn. tokens: in one call."""

    num_experts: int
    dispatcher: str
    paired: Paired
    tokens: int
    limit: Limit

    def cells(self) -> dict[str, str]:
        """See `harness.Row`."""
        pair, limit = self.paired, self.limit
        return {
            "dispatcher": self.dispatcher,
            "experts": str(self.num_experts),
            "ms": compact(1e3 * pair.seconds_a),
            "ratio to fewest": f"{pair.ratio:.2f} ({pair.low:.2f}..{pair.high:.2f})",
            "tokens/s": compact(self.tokens / pair.seconds_a),
            "FLOPs": compact(limit.flops),
            "bytes": compact(limit.bytes),
            "compute ms": compact(1e3 * limit.compute),
            "memory ms": compact(1e3 * limit.memory),
            "over limit": f"{pair.seconds_a / limit.seconds:.2f}",
            "peak FLOP/s": compact(limit.peak),
            "bandwidth B/s": compact(limit.bandwidth),
        }

    def drawn(self) -> Drawn:
        """See `harness.Row`."""
        values = {"measured": 1e3 * self.paired.seconds_a, "limit": 1e3 * self.limit.seconds}
        return Drawn(f"{self.num_experts} experts", values, "milliseconds", self.num_experts, self.dispatcher)

    def to_json(self) -> dict[str, Any]:
        """See `harness.Row`."""
        values = dataclasses.asdict(self)
        limit = values.pop("limit")
        times = {"compute_seconds": self.limit.compute, "memory_seconds": self.limit.memory}
        return {**values, **values.pop("paired"), **limit, **times, "limit_seconds": self.limit.seconds}


def experts(options: Options) -> list[Scaled]:
    """A row for each of `DISPATCHERS` x `COUNTS`: forward and backward of the layer on one device.

    Raises `ConfigError` when the tokens are not whole groups.
    """
    sizes, counts = (QUICK, QUICK_COUNTS) if options.quick else (FULL, COUNTS)
    if options.tokens is not None:
        sizes = dataclasses.replace(sizes, tokens=options.tokens)
    if sizes.tokens % sizes.group:
        raise ConfigError("tokens", sizes.tokens, f"must be a multiple of the group size {sizes.group}")
    repeats = options.repeats or (QUICK_REPEATS if options.quick else REPEATS)
    copied = min(COPIED, 1 << 20) if options.quick else COPIED
    speeds = [(matmul_peak(options.dtype), copy_bandwidth(copied))]
    found = []
    with jax.set_mesh(make_mesh({}, jax.local_devices()[:1])):
        for dispatcher in DISPATCHERS:
            fewest = _call(counts[0], dispatcher, sizes, options)
            for count in counts:
                # One at a time: the largest hold most of a small machine's memory.
                times = paired(_call(count, dispatcher, sizes, options), fewest, repeats)
                found.append((count, dispatcher, times))
    speeds.append((matmul_peak(options.dtype), copy_bandwidth(copied)))
    peak, bandwidth = (max(values) for values in zip(*speeds, strict=True))
    return [
        Scaled(
            count,
            dispatcher,
            times,
            sizes.tokens,
            Limit(useful_flops(sizes, count), weight_bytes(sizes, count), peak, bandwidth),
        )
        for count, dispatcher, times in found
    ]


def weight_bytes(sizes: Sizes, num_experts: int) -> int:
    """Bytes of float32 weights read forward, read backward, and written as gradients: three times all experts.

    Every expert is touched where there are far more choices than experts. Activations are left out: they do not grow.
    """
    return 3 * 4 * num_experts * 2 * sizes.d_model * (sizes.d_ff // TOP_K)


def copy_bandwidth(size: int = COPIED, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes/s that a large array is read and written at, the median of a few passes over `size` bytes."""
    x = jnp.zeros(size // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    jax.block_until_ready(add(x))
    times = []
    for _ in range(COPIES):
        start = clock()
        jax.block_until_ready(add(x))
        times.append(clock() - start)
    return 2 * size / statistics.median(times)


def _call(num_experts: int, dispatcher: str, sizes: Sizes, options: Options) -> Callable[[], object]:
    return time_sparse(Case(num_experts, TOP_K, dispatcher), sizes, options.dtype, options.activation).call
