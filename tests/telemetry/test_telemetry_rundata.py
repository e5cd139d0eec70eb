"""Reading a run directory: which rows count, what the bottom line averages, smoothing and thinning by hand."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from telemetry_fake_run import train_rows, validation_rows, write_run

from sparse_lm.telemetry.rundata import get, load_run, number, resample, smooth, thin, verdict


def run_of(tmp_path, train=(), validation=(), steps=100):
    return load_run(write_run(tmp_path / "a run", list(train), list(validation), steps))


def test_rows_are_sorted_into_splits(tmp_path):
    run = run_of(tmp_path, train_rows(50, 2, 4), validation_rows(50, 10))
    assert run.name == "a run"
    assert [row["step"] for row in run.train] == list(range(1, 51))
    assert [row["step"] for row in run.validation] == [10, 20, 30, 40, 50]
    assert len(run.layers) == 50
    assert (run.total_steps, run.last_step) == (100, 50)
    assert not run_of(tmp_path / "dense", train_rows(5, 0, 0)).layers


def test_of_two_rows_for_a_step_the_newer_counts(tmp_path):
    rows = [{"step": 1, "split": "train", "loss": loss} for loss in (9.0, 3.0)]
    run = run_of(tmp_path, rows, [{"step": 1, "split": "validation", "loss": 5.0}])
    assert run.column("loss") == ([1], [3.0])
    assert run.column("loss", "validation") == ([1], [5.0])


def test_a_column_keeps_nulls_and_skips_rows_without_the_key(tmp_path):
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3}, {"step": 4, "loss": 1}]
    run = run_of(tmp_path, rows)
    assert run.column("loss") == ([1, 2, 4], [2.0, None, 1])
    assert run.has("loss") and not run.has("mfu") and not run.has("loss", "validation")


def test_a_run_that_has_not_logged_yet_has_no_rows(tmp_path):
    run = run_of(tmp_path)
    assert (run.train, run.last_step) == ((), 0)
    bottom = verdict(run)
    assert (bottom.averaged, bottom.train_loss, bottom.validation_loss, bottom.seconds) == (0, None, None, None)
    assert bottom.nonfinite_steps == 0


def test_without_a_config_the_directory_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist; a report needs"):
        load_run(tmp_path)


@pytest.mark.parametrize(("text", "why"), [("{", "not valid JSON"), ("[1]", "expected an object, got list")])
def test_a_damaged_config_is_named(tmp_path, text, why):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json: {why}"):
        load_run(tmp_path)


@pytest.mark.parametrize("step", [None, "3", 1.5])
def test_a_row_without_a_step_is_named(tmp_path, step):
    write_run(tmp_path, [], [], 1)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n" + json.dumps({"step": step}) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: row 2 has step="):
        load_run(tmp_path)


def test_a_torn_last_line_does_not_stop_the_report(tmp_path):
    run_dir = write_run(tmp_path, train_rows(5, 0, 0), [], 5)
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')
    assert load_run(run_dir).last_step == 5


def test_the_bottom_line_by_hand(tmp_path):
    train = [
        {"step": s, "split": "train", "loss": float(s), "tokens_per_second": 10.0 * s, "nonfinite_steps": s // 60}
        for s in range(1, 101)
    ]
    train[-1] |= {"dropped_fraction": 0.5, "seconds": 77.0, "mfu": None}
    validation = [
        {"step": 50, "split": "validation", "loss": 9.0, "entropy_gap": 8.0},
        {"step": 90, "split": "validation", "loss": 4.0, "bits_per_byte": 1.5, "entropy_gap": 0.25},
    ]
    bottom = verdict(run_of(tmp_path, train, validation))
    assert bottom.averaged == 2  # 1/50 of 100 rows
    assert (bottom.train_loss, bottom.tokens_per_second) == (99.5, 995.0)
    assert (bottom.validation_step, bottom.validation_loss, bottom.bits_per_byte) == (90, 4.0, 1.5)
    assert (bottom.entropy_gap, bottom.best_loss) == (0.25, 3.75)
    assert (bottom.dropped, bottom.mfu, bottom.max_violation) == (0.5, None, None)
    assert (bottom.nonfinite_steps, bottom.seconds) == (1, 77.0)


def test_get_and_number():
    assert get({"a": {"b": 1}}, "a", "b") == 1
    assert get({"a": {"b": 1}}, "a", "c") is None
    assert get({"a": 1}, "a", "b") is None
    assert [number(v) for v in (1, 2.5, True, "3", None)] == [1, 2.5, None, None, None]


def test_smoothing_by_hand():
    assert smooth([1.0, 2.0, 6.0, 4.0, 8.0], 1) == [1.0, 3.0, 4.0, 6.0, 6.0]
    assert smooth([1.0, None, 3.0, 5.0], 1) == [1.0, None, 4.0, 4.0]
    assert smooth([], 3) == []


def test_a_steep_start_is_not_bent():
    line = [100.0 - 3 * i for i in range(50)]
    assert smooth(line, 8)[:42] == pytest.approx(line[:42])


@given(st.lists(st.none() | st.floats(-100, 100), min_size=1, max_size=30), st.integers(0, 8))
def test_means_stay_within_the_values_and_gaps_stay(values, half_width):
    means = smooth(values, half_width)
    there = [v for v in values if v is not None]
    assert [m is None for m in means] == [v is None for v in values]
    assert all(min(there) - 1e-6 <= m <= max(there) + 1e-6 for m in means if m is not None)


def test_few_points_are_left_alone():
    assert thin([1, 2, 3], [3.0, None, 1.0], 3) == ([1, 2, 3], [3.0, None, 1.0])


def test_thinning_keeps_spikes_ends_and_gaps():
    values: list[float | None] = [1.0] * 1000
    values[0], values[500], values[700], values[999] = 7.0, 99.0, -99.0, 8.0
    values[100:200] = [None] * 100
    steps, kept = thin(range(1000), values, 100)
    assert len(kept) <= 104
    assert {0, 500, 700, 999} <= set(steps)
    assert None in kept
    assert all(values[step] == value for step, value in zip(steps, kept, strict=True))


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=300), st.integers(4, 50))
def test_thinning_keeps_order_and_range(values, limit):
    steps, kept = thin(range(len(values)), values, limit)
    assert steps == sorted(set(steps))
    numbers = [value for value in kept if value is not None]
    assert (min(numbers), max(numbers)) == (min(values), max(values))
    assert (kept[0], kept[-1]) == (values[0], values[-1])
    assert len(kept) <= limit + 2


def test_even_samples_resample_to_themselves():
    rows = np.arange(12.0).reshape(6, 2)
    assert (resample([10, 20, 30, 40, 50, 60], rows, 6) == rows).all()


def test_uneven_samples_are_averaged_and_carried_on():
    out = resample([0, 1, 10], np.array([[1.0], [3.0], [5.0]]), 5)
    assert out[:, 0].tolist() == [2, 2, 2, 2, 5]
    assert resample([3], np.array([[4.0]]), 1).tolist() == [[4.0]]


@pytest.mark.parametrize("steps", [[], [1, 2]])
def test_samples_and_steps_must_match(steps):
    with pytest.raises(ValueError, match="resampling 1 samples"):
        resample(steps, np.ones((1, 1)), 3)
