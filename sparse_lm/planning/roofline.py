"""How long a step takes at least: each of arithmetic, main memory and links at the vendor's full speed.

Assumptions, which no real run meets in full: every product runs at the chip's bfloat16 peak; main memory is read and
written at its peak; a collective along one mesh axis is a ring over that axis that uses the links of one torus
dimension in both directions, whatever else is on them; one along several axes goes over the longest; an all-to-all over
more devices than a torus has along a side is over a square of them, in both dimensions at once; where the axis leaves a
domain of links (GPUs of several hosts) the network carries it. With everything overlapped the step takes the
longest of the three, with nothing overlapped their sum. Without a capacity all devices have equal loads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from sparse_lm.planning.chips import Chip
from sparse_lm.planning.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step that arithmetic, main memory and communication take by themselves.

    ideal: seconds that the model's own FLOPs would take at the peak.
    """

    compute: float
    memory: float
    communication: float
    ideal: float

    @property
    def overlapped(self) -> float:
        """Seconds of the step when all three go on at once: a lower bound."""
        return max(self.compute, self.memory, self.communication)

    @property
    def serial(self) -> float:
        """Seconds when they wait for each other."""
        return self.compute + self.memory + self.communication

    @property
    def bound(self) -> str:
        """Which of the three is the longest."""
        parts = {"arithmetic": self.compute, "main memory": self.memory, "communication": self.communication}
        return max(parts, key=lambda name: parts[name])

    @property
    def utilisation(self) -> tuple[float, float]:
        """Model FLOPs utilisation (MFU): with nothing overlapped, and with everything."""
        return self.ideal / self.serial, self.ideal / self.overlapped


def roofline(
    chip: Chip, mesh: Mapping[str, int], flops: tuple[float, float], memory_bytes: float, moves: Sequence[Collective]
) -> Roofline:
    """The roofline of one device. flops: (executed, of the model), per device and step."""
    executed, model = flops
    return Roofline(
        compute=executed / chip.flops_per_second,
        memory=memory_bytes / chip.hbm_rate,
        communication=sum(collective_seconds(chip, mesh, move) for move in moves),
        ideal=model / chip.flops_per_second,
    )


def collective_seconds(chip: Chip, mesh: Mapping[str, int], move: Collective) -> float:
    """Seconds of a collective over its axes by its bytes; see the module for what is assumed.

    On a ring of n devices, all-gather and reduce-scatter of B bytes in all send (n - 1) / n * B through each device,
    an all-reduce twice that. An all-to-all of B bytes held by each sends B (n - 1) / n as well, over n / 4 hops on
    average where there are rings, and over sqrt(n) / 4 along each dimension of a square. A permutation sends B.
    """
    size = max((mesh[axis] for axis in move.axes), default=1)
    whole = 1
    for axis in move.axes:
        whole *= mesh[axis]
    if whole == 1:
        return 0.0
    far = chip.domain is not None and _span(mesh, move.axes) > chip.domain
    rate = chip.network_rate if far else chip.link_rate * chip.links
    share = (whole - 1) / whole
    along = size if size <= chip.side else math.sqrt(size)
    hops = max(1.0, along / 4) if chip.domain is None else 1.0
    passes = {
        "all-reduce": 2 * share,
        "collective-permute": 1.0,
        "all-to-all": share * hops,
        "ragged-all-to-all": share * hops,
    }.get(move.kind, share)
    return passes * move.bytes / rate


def _span(mesh: Mapping[str, int], axes: Sequence[str]) -> int:
    """How far apart, in numbers of devices, the members of a group along the axes stand, both ends included."""
    span, stride = 1, 1
    for axis in reversed(list(mesh)):
        if axis in axes:
            span += (mesh[axis] - 1) * stride
        stride *= mesh[axis]
    return span
