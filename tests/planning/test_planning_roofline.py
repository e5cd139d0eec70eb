"""Seconds of a step by hand numbers."""

from __future__ import annotations

import pytest

from sparse_lm.planning.chips import CHIPS, Chip
from sparse_lm.planning.collectives import Collective
from sparse_lm.planning.roofline import Roofline, collective_seconds, roofline

V5P = next(chip for chip in CHIPS if chip.name == "v5p")
H100 = next(chip for chip in CHIPS if chip.name == "h100")
MESH = {"data": 1, "fsdp": 4, "expert": 8, "model": 1}
SIMPLE = Chip("simple", "TPU v5", 10**9, hbm_rate=1e9, link_rate=50.0, network_rate=1.0)


def moved(kind, size, *axes):
    return Collective(kind, 1, size, True, axes)


@pytest.mark.parametrize(
    ("move", "seconds"),
    [
        (moved("all-gather", 800, "fsdp"), 800 * 3 / 4 / 100),  # both directions of a ring: 2 x 50 bytes/s
        (moved("reduce-scatter", 800, "fsdp"), 800 * 3 / 4 / 100),
        (moved("all-reduce", 800, "fsdp"), 2 * 800 * 3 / 4 / 100),
        (moved("collective-permute", 800, "fsdp"), 800 / 100),
        (moved("all-to-all", 800, "expert"), 800 * 7 / 8 * 2 / 100),  # two hops on average on a ring of 8
        (moved("all-to-all", 800, "fsdp"), 800 * 3 / 4 / 100),
        (moved("all-reduce", 800, "fsdp", "expert"), 2 * 800 * 31 / 32 / 100),
        (moved("all-gather", 800, "data"), 0.0),
        (moved("all-gather", 800), 0.0),
    ],
)
def test_collectives_on_rings(move, seconds):
    assert collective_seconds(SIMPLE, MESH, move) == pytest.approx(seconds)


def test_an_axis_longer_than_a_side_of_the_torus_lies_over_a_square():
    near, far = (collective_seconds(SIMPLE, {"expert": n}, moved("all-to-all", 800, "expert")) for n in (16, 64))
    assert near == pytest.approx(800 * 15 / 16 * 4 / 100)
    assert far == pytest.approx(800 * 63 / 64 * 2 / 100)  # 8 x 8: two hops on average in each dimension


@pytest.mark.parametrize(
    ("mesh", "axis", "rate"),
    [
        ({"fsdp": 1, "expert": 8}, "expert", 450e9),
        ({"fsdp": 2, "expert": 8}, "expert", 450e9),  # 8 neighbours are one host
        ({"fsdp": 2, "expert": 8}, "fsdp", 50e9),  # every 8th
        ({"fsdp": 1, "expert": 16}, "expert", 50e9),
        ({"fsdp": 4, "expert": 2}, "fsdp", 450e9),
    ],
)
def test_gpus_of_several_hosts_talk_over_the_network(mesh, axis, rate):
    size = mesh[axis]
    seconds = collective_seconds(H100, mesh, moved("all-gather", 10**9, axis))
    assert seconds == pytest.approx(1e9 * (size - 1) / size / rate)
    exchanged = collective_seconds(H100, mesh, moved("all-to-all", 10**9, axis))
    assert exchanged == pytest.approx(seconds)  # a switch has no hops


def test_the_parts_of_a_step():
    found = roofline(V5P, MESH, (459e12, 306e12), 2765e9 / 2, [moved("collective-permute", 20 * 10**9, "fsdp")])
    assert found == Roofline(
        compute=pytest.approx(1.0),
        memory=pytest.approx(0.5),
        communication=pytest.approx(0.1),
        ideal=pytest.approx(2 / 3),
    )
    assert found.overlapped == pytest.approx(1.0)
    assert found.serial == pytest.approx(1.6)
    assert found.utilisation == (pytest.approx(2 / 3 / 1.6), pytest.approx(2 / 3))


@pytest.mark.parametrize(
    ("parts", "bound"), [((3, 2, 1), "arithmetic"), ((1, 3, 2), "main memory"), ((1, 2, 3), "communication")]
)
def test_what_bounds_a_step(parts, bound):
    found = Roofline(*map(float, parts), ideal=0.5)
    assert (found.bound, found.overlapped) == (bound, 3.0)
