"""What chips have, and slices by name."""

from __future__ import annotations

import importlib.util

import pytest

from sparse_lm.config import ConfigError
from sparse_lm.planning.chips import CHIPS, Topology, cannot_compile, chip_of, described_devices, parse_topology


@pytest.mark.parametrize(
    ("text", "chip", "shape", "size"),
    [("v5p:4x4x4", "v5p", (4, 4, 4), 64), ("v5e:2x2", "v5e", (2, 2), 4), ("h100:16", "h100", (16,), 16)],
)
def test_a_topology_by_name(text, chip, shape, size):
    found = parse_topology(text)
    assert (found.chip.name, found.shape, found.size, found.name) == (chip, shape, size, text)


@pytest.mark.parametrize(
    ("text", "way_out"),
    [("v9:2x2", "known: v4, v5e, v5p, v6e, h100"), ("v5e", "v5e:4x4"), ("v5e:0x2", "v5e:4x4"), ("v5p:2x-2", "v5e:4x4")],
)
def test_what_is_no_topology_is_refused(text, way_out):
    with pytest.raises(ConfigError) as caught:
        parse_topology(text)
    assert (caught.value.key, caught.value.value) == ("topology", text)
    assert way_out in caught.value.why


def test_every_chip_has_a_peak_and_orders_its_rates():
    assert len({chip.name for chip in CHIPS}) == len({chip.kind for chip in CHIPS}) == len(CHIPS)
    for chip in CHIPS:
        assert chip_of(chip.kind) is chip
        assert chip.flops_per_second > 1e14
        assert chip.hbm_rate > chip.link_rate > chip.network_rate
    assert chip_of("cpu") is None
    # Each link's share of what the vendor states for all of them, in one direction.
    per_chip = {chip.name: chip.link_rate * (6 if chip.name in ("v4", "v5p") else 4) for chip in CHIPS[:4]}
    assert per_chip == {"v4": 300e9, "v5e": 200e9, "v5p": 600e9, "v6e": 400e9}


def test_gpus_are_not_compiled_for_and_the_way_out_is_named():
    assert "on a host with such a GPU" in str(cannot_compile(parse_topology("h100:8")))


def test_without_a_compiler_the_extra_is_named(monkeypatch):
    topology = parse_topology("v5e:2x2")
    assert cannot_compile(topology) is None, "libtpu is missing: install the extra dev or tpu-plan"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'sparse_lm[tpu-plan]'" in str(cannot_compile(topology))


@pytest.mark.parametrize(
    ("message", "way_out"),
    [
        ("ABORTED: Internal error when accessing libtpu multi-process lockfile.", "ALLOW_MULTIPLE_LIBTPU_LOAD=1"),
        ("INVALID_ARGUMENT: no such shape", "such as v5e:4x4"),
    ],
)
def test_a_slice_that_cannot_be_described_is_one_error(monkeypatch, message, way_out):
    from jax.experimental import topologies

    def refuse(*args, **kwargs):
        raise RuntimeError(message)

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(ConfigError, match="topology") as caught:
        described_devices(Topology(CHIPS[1], (3, 5)))
    assert message in caught.value.why and way_out in caught.value.why


def test_the_two_cores_of_a_v4_are_one_device(monkeypatch):
    from jax.experimental import topologies

    asked = []

    class Described:
        devices = ("device",)

    def describe(name, platform, **options):
        asked.append((name, platform, options))
        return Described

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    for name in ("v4:2x2x1", "v5p:2x2x1"):
        assert described_devices(parse_topology(name)) == ("device",)
    assert asked == [("v4:2x2x1", "tpu", {"chip_config_name": "megacore"}), ("v5p:2x2x1", "tpu", {})]
