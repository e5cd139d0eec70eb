"""Sinks: valid JSON whatever comes, crashes in mid-line, resumes, and silence on all processes but the first."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.telemetry import sinks
from sparse_lm.telemetry.sinks import MetricsFile, Sinks, TensorBoardSink, open_sinks, read_rows, scalars

ROWS = [{"step": step, "split": "train", "loss": 5.0 - step} for step in (1, 2, 3)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def write(path, rows):
    file = MetricsFile(path)
    for row in rows:
        file.append(row)
    file.close()


def test_rows_come_back_as_they_went(path):
    write(path, ROWS)
    assert read_rows(path) == ROWS
    assert path.read_text().count("\n") == 3


def test_every_line_is_on_disk_before_the_file_is_closed(path):
    file = MetricsFile(path)
    for count, row in enumerate(ROWS, 1):
        file.append(row)
        assert len(read_rows(path)) == count


def test_numbers_that_are_not_finite_become_null_at_any_depth(path):
    row = {"step": 1, "loss": float("nan"), "layers": {"load": [[0.5, np.inf]]}, "z": np.float32("-inf")}
    write(path, [row])
    strict = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"step": 1, "loss": None, "layers": {"load": [[0.5, None]]}, "z": None}


def test_arrays_and_scalars_of_numpy_and_jax(path):
    write(
        path, [{"step": np.int64(7), "load": jnp.array([[1.0, 2.0]]), "loss": jnp.float32(0.5), "ok": np.bool_(True)}]
    )
    assert read_rows(path) == [{"step": 7, "load": [[1.0, 2.0]], "loss": 0.5, "ok": True}]


def test_a_value_that_json_cannot_hold_is_named_and_leaves_no_trace(path):
    file = MetricsFile(path)
    file.append(ROWS[0])
    with pytest.raises(TypeError, match=r"row\.layers\.load\[1\]=.*object is not JSON"):
        file.append({"step": 2, "layers": {"load": [1, object()]}})
    file.append(ROWS[1])
    assert read_rows(path) == ROWS[:2]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_any_row_is_one_line_of_strict_json(row):
    line = json.dumps(sinks.plain(row), allow_nan=False)
    assert "\n" not in line
    assert sinks.plain(json.loads(line)) == sinks.plain(row)


def test_a_torn_last_line_is_left_out(path):
    write(path, ROWS)
    whole = path.read_bytes()
    for cut in range(len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:cut])
        # Without its newline alone a row is whole; one byte less and it is not.
        assert read_rows(path) in (ROWS[:2], ROWS)
    path.write_bytes(whole[:-2])
    assert read_rows(path) == ROWS[:2]
    path.write_bytes(whole[:-1])
    assert read_rows(path) == ROWS


def test_a_torn_character_at_the_end_is_left_out(path):
    write(path, ROWS)
    path.write_bytes(path.read_bytes() + b'{"step": 4, "note": "\xc3')
    assert read_rows(path) == ROWS


def test_an_invalid_line_in_the_middle_is_refused_with_its_number(path):
    write(path, ROWS)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:10], lines[2]]) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a row of metrics.*Remove the line"):
        read_rows(path)
    path.write_text(f"[1, 2]\n{lines[0]}\n")
    with pytest.raises(ValueError, match=r":1: .*expected an object, got list"):
        read_rows(path)


def test_no_file_is_an_error_and_an_empty_one_is_no_rows(path):
    with pytest.raises(FileNotFoundError):
        read_rows(path)
    path.parent.mkdir()
    path.write_text("\n")
    assert read_rows(path) == []


def test_opening_cuts_off_a_torn_line_so_that_the_next_row_stands_alone(path):
    write(path, ROWS)
    path.write_bytes(path.read_bytes() + b'{"step": 4, "lo')
    write(path, [{"step": 4}])
    assert read_rows(path) == [*ROWS, {"step": 4}]


def test_opening_gives_a_whole_last_line_its_newline(path):
    write(path, ROWS)
    path.write_bytes(path.read_bytes()[:-1])
    write(path, [{"step": 4}])
    assert read_rows(path) == [*ROWS, {"step": 4}]


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (1, 1), (2, 2), (3, 3), (99, 3)])
def test_truncate_after_keeps_the_rows_up_to_the_step(path, step, kept):
    write(path, ROWS)
    file = MetricsFile(path)
    file.truncate_after(step)
    assert read_rows(path) == ROWS[:kept]


def test_truncate_after_in_mid_run_goes_on_behind_the_cut(path):
    file = MetricsFile(path)
    for row in ROWS:
        file.append(row)
    file.truncate_after(1)
    file.append({"step": 2, "again": True})
    assert read_rows(path) == [ROWS[0], {"step": 2, "again": True}]


def test_truncation_is_all_or_nothing(path, monkeypatch):
    write(path, ROWS)
    file = MetricsFile(path)

    def crash(*arguments):
        raise OSError("power cut")

    monkeypatch.setattr(sinks.os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        file.truncate_after(1)
    assert read_rows(path) == ROWS
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


def test_an_inactive_file_writes_and_changes_nothing(path):
    file = MetricsFile(path, active=False)
    file.append(ROWS[0])
    file.truncate_after(0)
    file.close()
    assert not path.parent.exists()
    write(path, ROWS)
    MetricsFile(path, active=False).truncate_after(0)
    assert read_rows(path) == ROWS


def test_a_closed_file_refuses_rows(path):
    file = MetricsFile(path)
    file.close()
    file.close()
    with pytest.raises(ValueError, match="was closed"):
        file.append(ROWS[0])


def test_scalars_are_tagged_by_split_and_lists_are_left_out():
    row = {"step": 3, "split": "validation", "loss": 2, "losses_by_domain": {"code": 1.5, "text": None}}
    row |= {"bits_per_byte": float("nan"), "layers": {"load": [1.0]}, "note": "x", "flag": True}
    assert scalars(row) == {"validation/loss": 2.0, "validation/losses_by_domain/code": 1.5}
    assert scalars({"step": 1, "loss": 1.0}) == {"train/loss": 1.0}


class Recorder:
    def __init__(self, *, fails=False):
        self.rows, self.closed, self.fails = [], 0, fails

    def append(self, row):
        self.rows.append(row)

    def close(self):
        self.closed += 1
        if self.fails:
            raise OSError("disk full")


def test_several_sinks_all_get_rows_and_all_are_closed_even_if_one_fails():
    first, second = Recorder(fails=True), Recorder()
    with pytest.raises(OSError, match="disk full"), Sinks([first, second]) as both:
        both.append(ROWS[0])
    assert first.rows == second.rows == ROWS[:1]
    assert first.closed == second.closed == 1


def test_tensorboard_gets_tags_steps_and_values(tmp_path, monkeypatch):
    import tensorboardX

    seen, made = [], {}

    class Writer:
        def __init__(self, **options):
            made.update(options)

        def add_scalar(self, tag, value, global_step):
            seen.append((tag, value, global_step))

        def close(self):
            seen.append("closed")

    monkeypatch.setattr(tensorboardX, "SummaryWriter", Writer)
    sink = TensorBoardSink(tmp_path, resume_step=10)
    sink.append(ROWS[1])
    sink.close()
    sink.close()
    assert seen == [("train/loss", 3.0, 2), "closed"]
    assert made == {"logdir": str(tmp_path), "purge_step": 11}


def test_a_run_directory_gets_both_files_and_a_resume_drops_later_rows(tmp_path):
    with open_sinks(tmp_path) as both:
        for row in ROWS:
            both.append(row)
    events = list((tmp_path / "tensorboard").iterdir())
    assert len(events) == 1 and b"train/loss" in events[0].read_bytes()
    with open_sinks(tmp_path, resume_step=2, tensorboard=False) as both:
        both.append({"step": 3, "again": True})
    assert read_rows(tmp_path / "metrics.jsonl") == [*ROWS[:2], {"step": 3, "again": True}]


def test_other_processes_leave_the_run_directory_alone(tmp_path):
    with open_sinks(tmp_path / "run", active=False, resume_step=1) as both:
        both.append(ROWS[0])
    assert list(tmp_path.iterdir()) == []
