"""What accelerators have: main memory, its bandwidth, FLOP/s and links; and slices of them by name, without any there.

The vendors' figures, from the pages of Cloud TPU's documentation on v4, v5e, v5p and v6e
(docs.cloud.google.com/tpu/docs/v5p and so on) and NVIDIA's data sheet of the H100 SXM. Bandwidth between chips of a TPU
is stated per chip; here it is that of one link in one direction: v4 300 GB/s over 6 links, v5e 400 GB/s in both
directions over 4, v5p 600 GB/s over 6, v6e 800 GB/s in both directions over 4. H100: NVLink, 900 GB/s both ways.
Between hosts: the network cards of a host shared by its chips (v4 and v5p 200 Gbit/s for 4, v5e 200 Gbit/s for 8, v6e
4 x 200 Gbit/s for 8, H100 one card of 400 Gbit/s each).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from collections.abc import Sequence
from typing import Any

from sparse_lm.config import ConfigError
from sparse_lm.telemetry.peak import published_peak


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device. kind: as jax names it. hbm: bytes of main memory. Rates are bytes per second.

    hbm_rate: of main memory. link_rate: in one direction of one link to a neighbour. links: that a collective along one
    mesh axis uses at once, 2 on the rings of a torus. side: devices that one dimension of the torus has at most, for a
    mesh axis. network_rate: between hosts that no link connects. domain: devices that links connect, None where all of
    a slice are. backend: the platform that can compile for it.
    """

    name: str
    kind: str
    hbm: int
    hbm_rate: float
    link_rate: float
    network_rate: float
    links: int = 2
    side: int = 16
    domain: int | None = None
    backend: str = "tpu"

    @property
    def flops_per_second(self) -> float:
        """Dense bfloat16 FLOP/s, from the table that training's MFU uses."""
        peak = published_peak(self.kind)
        assert peak is not None, self.kind
        return peak


CHIPS = (
    Chip("v4", "TPU v4", 32 * 2**30, 1228e9, 50e9, 6.25e9),
    Chip("v5e", "TPU v5 lite", 16 * 2**30, 819e9, 50e9, 3.125e9),
    Chip("v5p", "TPU v5", 95 * 2**30, 2765e9, 100e9, 6.25e9),
    Chip("v6e", "TPU v6 lite", 32 * 2**30, 1638e9, 100e9, 12.5e9),
    Chip("h100", "NVIDIA H100 80GB HBM3", 80 * 10**9, 3350e9, 450e9, 50e9, links=1, domain=8, backend="cuda"),
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: which chips, and how many along each of its own axes, such as 4 x 4 x 4."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many devices."""
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """As it is written."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str) -> Topology:
    """`v5p:4x4x4` or `h100:16`. Raises `ConfigError` for an unknown chip or a shape that is not numbers."""
    name, _, shape = text.partition(":")
    chip = next((chip for chip in CHIPS if chip.name == name), None)
    if chip is None:
        raise ConfigError(
            "topology", text, f"unknown chip {name!r}; known: {', '.join(chip.name for chip in CHIPS)}, as in v5p:4x4x4"
        )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ConfigError("topology", text, "the shape is numbers with x between, as in v5e:4x4, v5p:2x2x4 or h100:16")
    return Topology(chip, tuple(int(size) for size in shape.split("x")))


def chip_of(device_kind: str) -> Chip | None:
    """The chip with this `device_kind`, or None."""
    return next((chip for chip in CHIPS if chip.kind == device_kind), None)


def cannot_compile(topology: Topology) -> str | None:
    """Why this host cannot compile for the topology, with the way out; None when it can."""
    if topology.chip.backend != "tpu":
        return (
            f"{topology.chip.name}: programs for GPUs are compiled on a host with such a GPU only; "
            "run there without --topology for the compiled figures"
        )
    if importlib.util.find_spec("libtpu") is None:
        return "there is no TPU compiler (libtpu) here: pip install 'sparse_lm[tpu-plan]' for the compiled figures"
    return None


def described_devices(topology: Topology) -> Sequence[Any]:
    """The devices of a TPU slice that is described, not there; programs can be compiled for them.

    Raises `ConfigError` when the compiler does not know such a slice, or another process keeps it.
    """
    from jax.experimental import topologies

    # The two cores of a v4 are one device in training.
    options = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    try:
        return topologies.get_topology_desc(topology.name, platform="tpu", **options).devices
    except Exception as error:  # jax raises its own kinds, by the version
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "lockfile" in message:
            way_out = "another process uses the TPU compiler; set ALLOW_MULTIPLE_LIBTPU_LOAD=1, or wait"
        else:
            way_out = "choose a shape that there is, such as v5e:4x4 or v5p:2x2x4"
        raise ConfigError("topology", topology.name, f"{message}; {way_out}") from error
