"""Pairs are timed in turn, and what is reported is what was measured."""

from __future__ import annotations

import dataclasses
import json

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.bench.harness import Comparison, Paired, Report, machine, paired, report, system_load


class FakeClock:
    """Time passes only in the two sides, by the seconds that they are given."""

    def __init__(self, a=(), b=()):
        self.now, self.calls = 100.0, []
        self.durations = {"a": iter(a), "b": iter(b)}

    def __call__(self):
        return self.now

    def side(self, name):
        def run():
            self.calls.append(name)
            self.now += next(self.durations[name])

        return run


def timed(a, b, repeats, warm_up=1):
    clock = FakeClock(a, b)
    return paired(clock.side("a"), clock.side("b"), repeats, warm_up, clock), clock


def test_the_sides_take_turns():
    _, clock = timed([1] * 4, [1] * 4, repeats=3)
    assert "".join(clock.calls) == "ab" * 4


def test_warm_up_does_not_count():
    found, _ = timed([100, 100, 3], [1, 1, 2], repeats=1, warm_up=2)
    assert found == Paired(ratio=1.5, low=1.5, high=1.5, seconds_a=3, seconds_b=2, repeats=1)


def test_no_warm_up():
    found, clock = timed([4], [2], repeats=1, warm_up=0)
    assert (found.ratio, clock.calls) == (2, ["a", "b"])


def test_medians_by_hand():
    found, _ = timed([2, 6, 5], [1, 2, 5], repeats=3, warm_up=0)
    # Ratios 2, 3, 1; medians 5 and 2, whose ratio would be 2.5.
    assert found == Paired(ratio=2, low=1, high=3, seconds_a=5, seconds_b=2, repeats=3)


def test_an_even_number_of_pairs_takes_the_middle():
    found, _ = timed([1, 3], [1, 1], repeats=2, warm_up=0)
    assert (found.ratio, found.seconds_a) == (2, 2)


durations = st.lists(st.floats(0.01, 100), min_size=1, max_size=9)


@given(durations, st.floats(0.1, 10))
def test_a_machine_that_slows_down_leaves_the_ratio(seconds, factor):
    found, _ = timed([factor * second for second in seconds], seconds, len(seconds), warm_up=0)
    assert found.low == pytest.approx(factor, rel=1e-6)
    assert found.high == pytest.approx(factor, rel=1e-6)


@given(durations, st.data())
def test_swapped_sides_give_the_inverse_spread(seconds, data):
    other = data.draw(st.lists(st.floats(0.01, 100), min_size=len(seconds), max_size=len(seconds)))
    forth, _ = timed(seconds, other, len(seconds), warm_up=0)
    back, _ = timed(other, seconds, len(seconds), warm_up=0)
    assert forth.low <= forth.ratio <= forth.high
    assert forth.low == pytest.approx(1 / back.high, rel=1e-5)
    assert forth.seconds_a == pytest.approx(back.seconds_b, rel=1e-6)


@pytest.mark.parametrize(("repeats", "warm_up"), [(0, 1), (-1, 0), (3, -1)])
def test_numbers_that_make_no_sense_are_refused(repeats, warm_up):
    with pytest.raises(ValueError, match=f"repeats={repeats} .* warm_up={warm_up}"):
        timed([1] * 9, [1] * 9, repeats, warm_up)


def test_an_error_of_a_side_comes_through():
    def broken():
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        paired(broken, broken, 1)


COMPARISON = Comparison(
    case="E=8 k=2 gather",
    against="dense",
    paired=Paired(ratio=1.25, low=1.2, high=1.5, seconds_a=0.5, seconds_b=0.4, repeats=5),
    tokens=4096,
    flops=10e9,
    flops_against=8e9,
    peak=100e9,
    work=1.3,
)


def test_shares_of_the_peak_by_hand():
    assert COMPARISON.share == pytest.approx(0.2)  # 10 GFLOP in 0.5 s of 100 GFLOP/s
    assert COMPARISON.share_against == pytest.approx(0.2)


def test_a_comparison_as_text():
    cells = COMPARISON.cells()
    assert cells["ratio"] == "1.25 (1.20..1.50)"
    assert (cells["ms"], cells["against ms"]) == ("500", "400")
    assert (cells["tokens/s"], cells["against tokens/s"]) == ("8.19k", "10.2k")
    assert (cells["of peak"], cells["peak FLOP/s"], cells["work"]) == ("20%", "100B", "1.30")
    assert dataclasses.replace(COMPARISON, work=None).cells()["work"] == "-"


def test_a_comparison_as_json_is_flat_and_complete():
    row = json.loads(json.dumps(COMPARISON.to_json()))
    assert row["tokens_per_second"] == 8192
    assert row["tokens_per_second_against"] == 10240
    assert row["share_of_peak"] == COMPARISON.share
    assert row["share_of_peak_against"] == COMPARISON.share_against
    assert {name: row[name] for name in dataclasses.asdict(COMPARISON.paired)} == dataclasses.asdict(COMPARISON.paired)
    assert {"case", "against", "tokens", "flops", "flops_against", "peak", "work"} <= row.keys()
    assert "paired" not in row


def test_a_report_names_its_machine():
    made = report("moe_layer", [COMPARISON], 0.5)
    here = made.machine
    assert here.jax == jax.__version__
    assert (here.device_kind, here.device_count) == (jax.devices()[0].device_kind, jax.device_count())
    assert here.cores >= 1
    assert here.load == 0.5
    assert here.cpu
    values = json.loads(json.dumps(made.to_json()))
    assert values.keys() == {"name", "machine", "rows", "date"}
    assert values["rows"] == [json.loads(json.dumps(COMPARISON.to_json()))]
    assert values["machine"] == dataclasses.asdict(here)
    assert made.date.endswith("+00:00")


def test_the_table_is_aligned():
    other = dataclasses.replace(COMPARISON, case="E=64 k=1 einsum, a longer name", tokens=1)
    text = Report("moe_layer", machine(0.0), [COMPARISON, other], "2026-01-02T03:04:05+00:00").text().splitlines()
    assert text[0] == "moe_layer, 2026-01-02T03:04:05+00:00"
    assert f"jax {jax.__version__}" in text[1]
    assert text[2].startswith("case ")
    assert len({len(line) for line in text[2:]}) == 1
    assert text[3].startswith("E=8 k=2 gather ")


def test_what_is_not_known_of_the_machine_is_left_out():
    bare = dataclasses.replace(machine(None), published_peak=None)
    line = Report("a", bare, [], "now").text()
    assert "load" not in line
    assert "published" not in line
    known = dataclasses.replace(bare, load=1.25, cores=2, published_peak=989e12)
    assert "load 1.2; " in Report("a", known, [], "now").text()
    assert "published peak 989T FLOP/s" in Report("a", known, [], "now").text()


def test_a_busy_machine_is_told():
    here = dataclasses.replace(machine(0.0), cores=2)
    for load, busy in ((2.0, False), (2.1, True)):
        text = Report("a", dataclasses.replace(here, load=load), [], "now").text()
        assert ("other processes keep the cores busy" in text) == busy
    load = system_load()
    assert load is None or load >= 0
