"""The record of a study: clocks by hand, machines in words, and every version that there was."""

from __future__ import annotations

import datetime
import json

import pytest
import study_cases

from sparse_lm.study.record import Record, covered, machine, record
from sparse_lm.study.results import gather, to_json
from sparse_lm.study.runner import run_dir

NOON = datetime.datetime(2026, 1, 2, 12)


def at(second: float) -> datetime.datetime:
    """A time after noon."""
    return NOON + datetime.timedelta(seconds=second)


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [
        ([], 0),
        ([(0, 10), (5, 15), (20, 25)], 20),
        ([(20, 25), (5, 15), (0, 10)], 20),
        ([(0, 30), (5, 6), (29, 31)], 31),
        ([(0, 10), (10, 20)], 20),
        ([(3, 3)], 0),
    ],
)
def test_time_in_which_something_went_on(spans, seconds):
    assert covered([(at(start), at(end)) for start, end in spans]) == seconds


def test_side_by_side_counts_once_on_the_clock_and_twice_in_all(tmp_path):
    plan = study_cases.plan(1)
    for run, ended in zip(plan.runs, ("03:04:30", "03:04:35", "23:10:00"), strict=True):
        study_cases.pretend(tmp_path, run, 1.0, seconds=10.0, ended=f"2026-01-02T{ended}")
    found = record(run_dir(tmp_path, run) for run in plan.runs)
    assert found == Record(
        started="2026-01-02T03:04:20",
        ended="2026-01-02T23:10:00",
        wall_seconds=25.0,
        run_seconds=30.0,
        machines=("abacus (Some CPU, 2 cores)",),
        versions=("python 3.11.7", "jax 0.10.2"),
        commits=("0123456789abcdef",),
    )
    assert found.words() == (
        "Run from 2026-01-02 03:04 to 23:10: 25s on the clock, 30s of runs; abacus (Some CPU, 2 cores); "
        "python 3.11.7, jax 0.10.2; commit 0123456789."
    )
    assert to_json(gather(plan, tmp_path))["record"]["wall_seconds"] == 25.0


def test_two_versions_and_two_machines_are_both_told(tmp_path):
    plan = study_cases.plan(1)
    for i, run in enumerate(plan.runs[:2]):
        study_cases.pretend(tmp_path, run, 1.0, ended=f"2026-01-0{i + 2}T00:00:05")
    path = run_dir(tmp_path, plan.runs[1]) / "config.json"
    other = json.loads(path.read_text()) | {"versions": {"jax": "0.11"}, "git": "fedcba9876543210-dirty", "host": None}
    path.write_text(json.dumps(other))
    found = record(run_dir(tmp_path, run) for run in plan.runs)
    assert found is not None and found.versions == ("python 3.11.7", "jax 0.10.2", "jax 0.11")
    assert "to 2026-01-03 00:00" in found.words() and "jax 0.10.2, jax 0.11" in found.words()
    assert "abacus (Some CPU, 2 cores) and abacus; " in found.words()
    assert found.words().endswith("commit 0123456789, fedcba9876-dirty.")


def test_nothing_finished_is_no_record(tmp_path):
    plan = study_cases.plan(1)
    assert record([tmp_path / "absent"]) is None
    assert gather(plan, tmp_path).record is None and to_json(gather(plan, tmp_path))["record"] is None


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({}, "unknown device"),
        ({"device": {"platform": "cpu", "kind": "cpu", "count": 1}}, "cpu"),
        ({"device": {"platform": "cpu", "count": 1}, "host": {"cpu": "A", "cores": 1}}, "A, 1 core"),
        (
            {"device": {"platform": "cpu", "count": 8}, "host": {"cpu": "A", "cores": 2}},
            "A, 2 cores, 8 virtual devices",
        ),
        (
            {"device": {"platform": "gpu", "kind": "H100", "count": 4}, "host": {"cpu": "A", "cores": 64}},
            "4 x H100 (A, 64 cores)",
        ),
    ],
)
def test_a_machine_in_words(info, words):
    assert machine(info) == words
