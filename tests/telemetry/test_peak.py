"""Peaks: the vendors' table by device name, and the arithmetic of the measurement on a clock of our own."""

import jax
import pytest

from sparse_lm.mesh import make_mesh
from sparse_lm.telemetry import peak
from sparse_lm.telemetry.peak import Peak, device_peak, matmul_peak, mfu, published_peak


class FakeClock:
    """Says that each timed section took as long as `durations` has it, in turn, the last one for ever."""

    def __init__(self, *durations):
        self.durations, self.now, self.calls = list(durations), 0.0, 0

    def __call__(self):
        self.calls += 1
        if self.calls % 2 == 0:
            self.now += self.durations.pop(0) if len(self.durations) > 1 else self.durations[0]
        return self.now


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("TPU v3", None),
        ("TPU v55", None),
        ("cpu", None),
    ],
)
def test_published_peaks(kind, expected):
    assert published_peak(kind) == expected


def test_median_of_what_fits():
    """0.05 s each after a first of 0.02: the median of 0.02 and 0.3 / 0.02 = 15 times 0.05."""
    clock = FakeClock(0.02, 0.05)
    assert matmul_peak(clock=clock) == pytest.approx(2 * 512**3 / 0.05)
    assert clock.calls == 2 * (1 + 15)


def test_one_slow_product_does_not_count():
    clock = FakeClock(0.1, 7.0, 0.1)
    assert matmul_peak(seconds=0.3, clock=clock) == pytest.approx(2 * 512**3 / 0.1)


def test_matrices_grow_until_a_product_takes_long_enough():
    clock = FakeClock(0.001, 0.008, 0.064)
    assert matmul_peak(seconds=0.1, clock=clock) == pytest.approx(2 * 2048**3 / 0.064)


def test_matrices_stop_growing(monkeypatch):
    monkeypatch.setattr(peak, "LARGEST", 1024)
    clock = FakeClock(0.001)
    assert matmul_peak(clock=clock) == pytest.approx(2 * 1024**3 / 0.001)
    assert clock.calls == 2 * (2 + peak.MOST)


def test_a_real_measurement(monkeypatch):
    monkeypatch.setattr(peak, "LARGEST", 512)
    found = device_peak()
    assert found.source == "measured" and found.device_kind == "cpu"
    assert 1e8 < found.flops_per_second < 1e15
    with jax.set_mesh(make_mesh({"data": -1})):
        assert device_peak("bfloat16").source == "measured"
        assert not jax.sharding.get_abstract_mesh().empty


def test_known_devices_are_not_measured(monkeypatch):
    class Device:
        device_kind = "TPU v5 lite"

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    monkeypatch.setattr(peak, "matmul_peak", lambda dtype: pytest.fail("measured"))
    assert device_peak() == Peak(197e12, "published", "TPU v5 lite")


@pytest.mark.parametrize("seconds", [0, -1.0])
def test_bad_seconds(seconds):
    with pytest.raises(ValueError, match="above 0"):
        matmul_peak(seconds=seconds)


def test_mfu_by_hand():
    """1000 tokens/s of 6 GFLOPs on 4 devices of 10 TFLOP/s: 6e12 of 40e12."""
    assert mfu(1000.0, 6e9, Peak(10e12, "measured", "cpu"), 4) == pytest.approx(0.15)
