"""Measures are read from what a run leaves behind."""

from __future__ import annotations

import pytest
import study_cases

from sparse_lm.study.measures import MEASURES, Curve, equal_time, measure_run
from sparse_lm.study.runner import run_dir


@pytest.fixture
def measured(tmp_path):
    """Pretends a finished run and measures it."""

    def make(loss: float = 1.25, **values):
        run = study_cases.plan().runs[1]
        study_cases.pretend(tmp_path, run, loss, **values)
        return measure_run(run_dir(tmp_path, run))

    return make


def test_every_measure_by_hand(measured):
    found = measured()
    # 256 tokens/s of 8 rows of 16 tokens; shares 0.5, 0.45, 0.05, 0 of four experts: under 0.025 lies one.
    assert found.values == {
        "validation_loss": 1.25,
        "train_loss": 2.0,
        "steps_per_second": 2.0,
        "max_violation": 0.25,
        "dropped": 0.125,
        "dead_experts": 1.0,
        "gradient_spikes": 0.0,
        "router_z": 3.0,
        "seconds": 10.0,
    }
    assert found.values.keys() <= MEASURES.keys()
    assert (found.parameters, found.active, found.flops_per_token, found.device) == (100, 50, 600, "abacus")
    assert found.curve == Curve((5, 10), (5.0, 10.0), (2.25, 1.25))


def test_what_is_not_finite_is_left_out(measured):
    found = measured(gradient_norm=None, max_violation=None)
    assert "gradient_spikes" not in found.values and "max_violation" not in found.values


def test_dense_runs_have_no_drops(measured):
    assert "dropped" not in measured(layers=None, dropped_fraction=0.0).values


def test_spikes(tmp_path):
    run = study_cases.plan().runs[1]
    study_cases.pretend(tmp_path, run, 1.0)
    path = run_dir(tmp_path, run) / "metrics.jsonl"
    path.write_text(path.read_text().replace('"gradient_norm": 1.0', '"gradient_norm": 10.5', 2))
    assert measure_run(run_dir(tmp_path, run)).values["gradient_spikes"] == pytest.approx(0.2)
    path.write_text(path.read_text().replace("10.5", "9.5"))
    assert measure_run(run_dir(tmp_path, run)).values["gradient_spikes"] == 0.0


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        measure_run(tmp_path)


def test_a_curve_is_read_between_evaluations():
    curve = Curve((5, 10), (5.0, 10.0), (3.0, 1.0))
    assert [curve.at(seconds) for seconds in (4.9, 5, 7.5, 10, 10.1)] == [None, 3.0, 2.0, 1.0, None]
    assert Curve((), (), ()).at(1.0) is None


def test_equal_time_is_the_first_to_be_done():
    slow, fast = Curve((5, 10), (10.0, 20.0), (3.0, 1.0)), Curve((5, 10), (6.0, 12.0), (4.0, 2.0))
    # At 12 seconds the slow one is a fifth of the way from 3 to 1.
    assert equal_time({"slow": slow, "fast": fast}) == pytest.approx({"slow": 2.6, "fast": 2.0})


def test_equal_time_without_an_evaluation_before():
    late, fast = Curve((10,), (20.0,), (1.0,)), Curve((5, 10), (6.0, 12.0), (4.0, 2.0))
    assert equal_time({"late": late, "fast": fast}) == {"fast": 2.0}
    assert equal_time({"none": Curve((), (), ()), "fast": fast}) == {}
    assert equal_time({}) == {}
