"""Each start is a process of its own, and its phases are told apart."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny

from sparse_lm.bench import startup as module
from sparse_lm.bench.harness import Options, Paired
from sparse_lm.bench.startup import Phases, Start, StartupError, measure, startup
from sparse_lm.train.loop import TrainingError

EXPERIMENT = tiny.experiment(model__dropout=0.0, model__num_layers=1, model__moe__every=1)
PHASES = Phases(imports=1.0, data=0.5, state=2.0, first_step=3.0, later_step=0.25, traces=1)


def test_a_measured_process_takes_its_steps_with_one_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device compiles sooner than eight
    phases = measure(EXPERIMENT, tmp_path / "cache")
    assert phases.traces == 1
    assert all(seconds > 0 for seconds in dataclasses.astuple(phases))
    assert phases.first_step > phases.later_step
    assert any((tmp_path / "cache").iterdir())  # so that the next process starts warm


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(StartupError, match="status 1") as caught:
        measure(EXPERIMENT.replace(mesh__expert=3), tmp_path)
    assert "config.mesh" in str(caught.value)
    assert isinstance(caught.value, TrainingError)  # the mains show it as one


@pytest.fixture
def processes(monkeypatch):
    """Stands in for the processes: the first steps take 1, 2, 3 ... seconds; lists the caches that they were given."""
    caches = []

    def fake(experiment, cache):
        assert experiment is EXPERIMENT
        caches.append(cache)
        return dataclasses.replace(PHASES, first_step=float(len(caches)))

    monkeypatch.setattr(module, "measure", fake)
    return caches


def test_every_cold_start_has_a_cache_of_its_own_and_warms_the_next(processes):
    cold, warm = startup(Options(EXPERIMENT, repeats=3))
    assert len(processes) == 8  # one pair to warm up
    assert processes[0::2] == processes[1::2]
    assert len(set(processes)) == 4
    # Of the first steps 3, 5, 7 and 4, 6, 8.
    assert (cold.phases.first_step, warm.phases.first_step) == (5, 6)
    assert (cold.case, warm.case) == ("cold", "warm")
    assert cold.ratio is not None
    assert cold.ratio.repeats == 3
    assert warm.ratio is None


def test_a_quick_look_starts_twice(processes):
    startup(Options(EXPERIMENT, quick=True))
    assert len(processes) == 2
    assert not processes[0].exists()  # cleaned up


def test_a_row_as_text_and_as_json():
    ratio = Paired(ratio=2.0, low=1.5, high=2.5, seconds_a=8.0, seconds_b=4.0, repeats=3)
    row = Start("cold", PHASES, 8.0, ratio)
    cells = row.cells()
    assert cells["cache"] == "cold"
    assert (cells["imports s"], cells["first step s"], cells["process s"]) == ("1.00", "3.00", "8.00")
    assert cells["cold / warm"] == "2.00 (1.50..2.50)"
    assert cells["traces"] == "1 in 4 steps"
    values = json.loads(json.dumps(row.to_json()))
    assert values["first_step_seconds"] == 3
    assert values["traces"] == 1
    assert values["cold_over_warm"] == dataclasses.asdict(ratio)


def test_the_rows_have_the_same_columns():
    warm = Start("warm", PHASES, 4.0, None)
    assert warm.cells()["cold / warm"] == "-"
    assert warm.to_json()["cold_over_warm"] is None
    cold = dataclasses.replace(warm, ratio=Paired(1, 1, 1, 1, 1, 1))
    assert list(cold.cells()) == list(warm.cells())
    assert list(cold.to_json()) == list(warm.to_json())
