"""Test surroundings: eight virtual CPU devices, a compilation cache, array annotations checked at run time.

The environment is set before anything imports jax, because jax reads it once. What the user has set stays.
"""

from __future__ import annotations

import gc
import os
import pathlib
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parent.parent
NUM_DEVICES = 8
BYTES_OF_MAPS = 2_000_000  # of /proc/self/maps: about 25,000 lines
DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"

# Tests compile thousands of small programs and run each once or twice: unoptimised code is ready in half the time, and
# code by XLA's older emitters of fusions in half of that.
if "--xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    fast += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fast}".strip()
if DEVICE_COUNT_FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICE_COUNT_FLAG}={NUM_DEVICES}".strip()
# A program from the compilation cache has lost the order of its collectives, and each that waits for other devices
# holds a thread of the pool that they share: eight can all be waiting.
os.environ.setdefault("NPROC", str(32 * NUM_DEVICES))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import typecheck  # noqa: E402  (a plain module of tests/; must come before the first import of the package)

typecheck.install("sparse_lm")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

gc.freeze()  # what was imported stays: a tenth of the time went into looking through it again and again
gc.set_threshold(50_000, 20, 20)

hypothesis.settings.register_profile("repeatable", deadline=None, max_examples=30, derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def mesh_of() -> Callable[..., jax.sharding.Mesh]:
    """Makes a mesh by the sizes of its axes, as in `mesh_of(data=2, expert=4)`; takes as many devices as they need."""
    from sparse_lm.mesh import make_mesh

    def make(**sizes: int) -> jax.sharding.Mesh:
        needed = 1
        for size in sizes.values():
            needed *= size
        if needed > len(jax.devices()):
            pytest.fail(f"mesh {sizes} needs {needed} devices, there are {len(jax.devices())}: check XLA_FLAGS")
        return make_mesh(sizes, jax.devices()[:needed])

    return make


@pytest.fixture(autouse=True)
def memory_maps():
    """Forgets compiled programs before a process runs out of memory maps.

    Every program takes some, Linux allows 65,530 of them by default, and jaxlib ends in a segmentation fault at the
    next one. What is needed again comes from the compilation cache.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes()) > BYTES_OF_MAPS:
        jax.clear_caches()
