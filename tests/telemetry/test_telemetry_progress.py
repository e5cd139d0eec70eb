"""Progress on a made-up terminal, which is played back character by character, and in a log file."""

import io
import itertools
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.telemetry.progress import Progress, Status, describe, fit


class Terminal(io.StringIO):
    """Knows what is on screen: carriage return, erase line and newline, no more."""

    def isatty(self):
        return True

    def screen(self):
        lines = [""]
        for part in re.findall(r"\r|\n|\x1b\[2K|[^\r\n\x1b]+", self.getvalue()):
            if part == "\n":
                lines.append("")
            elif part == "\x1b[2K":
                lines[-1] = ""
            elif part == "\r":
                pass  # always followed by an erasure, as checked below
            else:
                lines[-1] += part
        assert self.getvalue().count("\r") == self.getvalue().count("\r\x1b[2K")
        return lines


class Time:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def status(step, **changes):
    full = {"loss": 2.34567, "tokens_per_second": 12_345, "eta_seconds": 80, "dropped_fraction": 0.0123}
    return Status(step, **{**full, "max_violation": 0.4, **changes})


@pytest.fixture
def time():
    return Time()


def live(time, total=1000, width=60):
    terminal = Terminal()
    return terminal, Progress(total, terminal, width=lambda: width, now=time)


def test_the_parts_of_a_line():
    assert describe(status(250), 1000) == [
        "step 250/1000 25%",
        "loss 2.3457",
        "12.3k tok/s",
        "ETA 1m20s",
        "dropped 1.2%",
        "imbalance 0.40",
    ]


def test_what_is_not_known_is_not_shown():
    assert describe(Status(1), 3) == ["step 1/3 33.3%"]
    assert describe(status(5, dropped_fraction=None, max_violation=None), 5)[0] == "step 5/5 100%"
    assert not any("dropped" in part for part in describe(status(5, dropped_fraction=None), 5))


def test_a_terminal_60_columns_wide_shows_whole_parts_only(time):
    terminal, progress = live(time)
    progress.update(status(250))
    assert terminal.screen() == ["step 250/1000 25%  loss 2.3457  12.3k tok/s  ETA 1m20s"]
    terminal, progress = live(time, width=200)
    progress.update(status(250))
    assert terminal.screen()[0].endswith("dropped 1.2%  imbalance 0.40")


@given(st.integers(1, 120), st.integers(0, 10**9))
def test_the_live_line_never_reaches_the_last_column(width, step):
    terminal = Terminal()
    progress = Progress(10**9, terminal, width=lambda: width, now=Time())
    progress.update(status(step))
    assert all(len(line) < width for line in terminal.screen())


@given(st.lists(st.text(alphabet="abc", min_size=1, max_size=9), min_size=1, max_size=6), st.integers(0, 60))
def test_fit_keeps_a_prefix_of_the_parts(parts, width):
    line = fit(parts, width)
    assert len(line) <= width
    assert "  ".join(parts).startswith(line)


def test_one_line_is_redrawn_and_not_too_often(time):
    terminal, progress = live(time)
    for step in range(1, 101):
        progress.update(status(step))
        time.seconds += 0.01
    assert len(terminal.screen()) == 1
    # The first at 0.00 s, then one as soon as each further 0.1 s are over.
    assert terminal.getvalue().count("step") == 10


def test_the_last_step_is_always_drawn_and_its_line_ended(time):
    terminal, progress = live(time, total=3)
    with progress:
        for step in (1, 2, 3):
            progress.update(status(step))
    assert terminal.screen()[0].startswith("step 3/3")
    assert terminal.screen()[1:] == [""]


def test_closing_shows_the_newest_status_of_a_run_that_stopped_early(time):
    terminal, progress = live(time)
    progress.update(status(1))
    progress.update(status(2))
    progress.close()
    progress.close()
    assert terminal.screen()[0].startswith("step 2/1000")
    assert len(terminal.screen()) == 2


def test_a_message_stands_above_the_live_line(time):
    terminal, progress = live(time)
    progress.message("compiling")
    progress.update(status(1))
    progress.message("validation loss 2.5")
    first, second, third = terminal.screen()
    assert (first, second) == ("compiling", "validation loss 2.5")
    assert third.startswith("step 1/1000")


def test_a_log_file_gets_plain_lines(time):
    log = io.StringIO()
    with Progress(1000, log, now=time) as progress:
        progress.update(status(1))
        progress.message("hello")
    assert log.getvalue() == (
        "step 1/1000 0.1%  loss 2.3457  12.3k tok/s  ETA 1m20s  dropped 1.2%  imbalance 0.40\nhello\n"
    )
    assert "\r" not in log.getvalue() and "\x1b" not in log.getvalue()


def logged(time, total, seconds):
    log = io.StringIO()
    with Progress(total, log, now=time) as progress:
        for step in range(1, total + 1):
            time.seconds += seconds
            progress.update(Status(step))
    return [int(line.split()[1].split("/")[0]) for line in log.getvalue().splitlines()]


def test_a_fast_run_logs_every_twentieth_of_its_steps(time):
    assert logged(time, 100, 0.001) == [1, *range(6, 100, 5), 100]


def test_a_slow_run_logs_about_every_five_seconds(time):
    steps = logged(time, 200, 1.0)
    assert steps[:4] == [1, 6, 11, 16]
    assert steps[-1] == 200


def test_a_long_run_logs_hundreds_of_lines_and_not_thousands(time):
    steps = logged(time, 36_000, 1.0)
    assert 100 < len(steps) < 500
    assert steps[0] == 1 and steps[-1] == 36_000
    # The gaps grow with the time that has passed, but stay under 5 % of the run.
    assert max(later - earlier for earlier, later in itertools.pairwise(steps)) <= 0.05 * 36_000


def test_a_run_of_one_step_logs_one_line(time):
    assert logged(time, 1, 1.0) == [1]


def test_inactive_progress_is_silent(time):
    terminal = Terminal()
    with Progress(10, terminal, active=False, now=time) as progress:
        progress.update(status(10))
        progress.message("hello")
    assert terminal.getvalue() == ""


def test_live_can_be_forced_either_way(time):
    terminal = Terminal()
    Progress(10, terminal, live=False, now=time).update(Status(1))
    assert terminal.getvalue() == "step 1/10 10%\n"
    log = io.StringIO()
    Progress(10, log, live=True, now=time).update(Status(1))
    assert log.getvalue() == "\r\x1b[2Kstep 1/10 10%"


def test_the_width_is_asked_of_the_stream(time, monkeypatch):
    terminal = Terminal()
    terminal.fileno = lambda: 77
    asked = []

    def size(descriptor):
        asked.append(descriptor)
        return os.terminal_size((20, 5))

    monkeypatch.setattr(os, "get_terminal_size", size)
    Progress(1000, terminal, now=time).update(status(250))
    assert asked == [77]
    assert terminal.screen() == ["step 250/1000 25%"]


def test_a_stream_without_a_descriptor_is_80_columns_wide(time):
    terminal = Terminal()
    Progress(1000, terminal, now=time).update(status(250))
    (line,) = terminal.screen()
    assert line.endswith("dropped 1.2%") and len(line) < 80
