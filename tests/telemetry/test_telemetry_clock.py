"""The clock on a hand-moved time: every second lands in one kind, and pauses do not slow the throughput."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.telemetry.clock import KINDS, Account, Clock


class Time:
    """A clock that moves when told to."""

    def __init__(self, start=100.0):
        self.seconds = start

    def __call__(self):
        return self.seconds

    def go(self, seconds):
        self.seconds += seconds


@pytest.fixture
def time():
    return Time()


def test_a_small_run_by_hand(time):
    clock = Clock(total_steps=4, now=time)
    time.go(1)  # other
    with clock.pause("compile"):
        time.go(20)
    for _ in range(2):
        with clock.measure("data"):
            time.go(0.5)
        with clock.measure("step"):
            time.go(2)
        clock.step_done(tokens=100)
    with clock.pause("evaluation"):
        time.go(3)
    with clock.pause("checkpoint"):
        time.go(0.5)
    account = clock.account()
    assert account == Account(compile=20, step=4, evaluation=3, checkpoint=0.5, data=1, other=1)
    assert account.total == clock.seconds == 29.5
    assert clock.tokens_per_second == pytest.approx(200 / 6)  # 1 other + 2 x (0.5 data + 2 step)
    assert clock.step_seconds == pytest.approx(3)
    # Two steps of 3 s, and 3.5 s of evaluation and checkpoint for every 6 s of training.
    assert clock.eta(2) == pytest.approx(2 * 3 * (1 + 3.5 / 6))
    assert clock.eta(4) == clock.eta(9) == 0


def test_shares_sum_to_one(time):
    clock = Clock(1, now=time)
    assert set(clock.account().shares().values()) == {0.0}
    time.go(1)
    with clock.measure("step"):
        time.go(3)
    assert clock.account().shares() == {**dict.fromkeys(KINDS, 0.0), "step": 0.75, "other": 0.25}


def test_nothing_is_known_before_the_first_step(time):
    clock = Clock(10, now=time)
    time.go(5)
    assert (clock.tokens_per_second, clock.step_seconds, clock.eta(0)) == (None, None, None)


def test_the_window_forgets_slow_early_steps(time):
    clock = Clock(100, window=3, now=time)
    for seconds in (10, 10, 1, 1, 1):
        time.go(seconds)
        clock.step_done(50)
    assert clock.tokens_per_second == pytest.approx(50)
    time.go(4)
    clock.step_done(50)
    assert clock.tokens_per_second == pytest.approx(150 / 6)


def test_a_pause_changes_neither_throughput_nor_step_time(time):
    plain, paused = Clock(10, now=time), Clock(10, now=time)
    time.go(2)
    plain.step_done(10)
    paused.step_done(10)
    before = plain.tokens_per_second
    with paused.pause():
        time.go(100)
    time.go(2)
    paused.step_done(10)
    assert paused.tokens_per_second == before == 5
    assert paused.account().evaluation == 100


def test_inner_blocks_are_charged_to_themselves_only(time):
    clock = Clock(1, now=time)
    with clock.measure("step"):
        time.go(1)
        with clock.measure("data"):
            time.go(2)
        time.go(4)
    assert (clock.account().step, clock.account().data) == (5, 2)


def test_everything_inside_a_pause_is_paused(time):
    clock = Clock(1, now=time)
    with clock.pause("evaluation"):
        with clock.measure("data"):
            time.go(5)
        with clock.pause("checkpoint"):
            time.go(1)
        time.go(2)
    time.go(1)
    clock.step_done(8)
    assert clock.tokens_per_second == 8
    account = clock.account()
    assert (account.evaluation, account.data, account.checkpoint, account.other) == (2, 5, 1, 1)


def test_an_exception_closes_its_block(time):
    clock = Clock(1, now=time)
    with pytest.raises(RuntimeError), clock.pause("checkpoint"):
        time.go(1)
        raise RuntimeError
    time.go(2)
    clock.step_done(4)
    assert clock.account().checkpoint == 1
    assert clock.tokens_per_second == 2


def test_a_resumed_run_counts_its_earlier_seconds(time):
    clock = Clock(1, seconds_before=40, now=time)
    time.go(2)
    assert clock.seconds == 42
    assert clock.account().total == 2


def test_a_time_that_stands_still_gives_no_infinite_throughput(time):
    clock = Clock(2, now=time)
    clock.step_done(10)
    assert clock.tokens_per_second is None
    assert clock.eta(1) == 0


def test_bad_arguments_are_named(time):
    clock = Clock(1, now=time)
    with pytest.raises(ValueError, match="total_steps=0"):
        Clock(0, now=time)
    with pytest.raises(ValueError, match="window=0"):
        Clock(1, window=0, now=time)
    unknown: Any = "lunch"
    with pytest.raises(ValueError, match="clock kind 'lunch' is unknown; known: compile, step"), clock.measure(unknown):
        pytest.fail("nothing inside may run")


events = st.lists(st.tuples(st.sampled_from((*KINDS, "done")), st.floats(0, 100), st.booleans()), max_size=20)


@given(events)
def test_the_kinds_always_sum_to_wall_time(events):
    time = Time(0.0)
    clock = Clock(5, now=time)
    expected = dict.fromkeys(KINDS, 0.0)
    for kind, seconds, pause in events:
        if kind == "done":
            clock.step_done(3)
            continue
        with (clock.pause if pause else clock.measure)(kind):
            time.go(seconds)
        expected[kind] += seconds
        time.go(0.25)
        expected["other"] += 0.25
    account = clock.account()
    assert account.total == pytest.approx(clock.seconds)
    assert {kind: getattr(account, kind) for kind in KINDS} == pytest.approx(expected)


def test_the_real_clock_runs_forwards():
    clock = Clock(1)
    first = clock.seconds
    assert 0 <= first <= clock.seconds
