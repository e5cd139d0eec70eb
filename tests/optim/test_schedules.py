"""Schedules against tables worked out by hand."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm.optim.config import OptimConfig
from sparse_lm.optim.schedules import schedule


def _table(name, steps, warmup, final=0.1, peak=8.0, beyond=0):
    config = OptimConfig(schedule=name, warmup_steps=warmup, final_fraction=final, learning_rate=peak)
    return [np.asarray(schedule(config, steps)(count)).item() for count in range(steps + beyond)]


def test_warm_up_starts_above_zero_and_reaches_the_peak_with_its_last_update():
    assert _table("constant", 6, 4) == pytest.approx([2, 4, 6, 8, 8, 8])


def test_linear():
    # 4 updates after the peak: 8 -> 4 in steps of 1.
    assert _table("linear", 6, 2, final=0.5) == pytest.approx([4, 8, 7, 6, 5, 4])


def test_cosine():
    # Half a cosine from 8 to 0 in 4 updates: 4 * (1 + cos(pi i / 4)).
    fall = [4 * (1 + np.cos(np.pi * i / 4)) for i in (1, 2, 3)]
    assert fall == pytest.approx([6.828427, 4, 1.171573])
    assert _table("cosine", 6, 2, final=0.0) == pytest.approx([4, 8, *fall, 0], abs=1e-6)


def test_rsqrt():
    # Update n (from 1) after w = 4: 8 * sqrt(4 / n).
    assert _table("rsqrt", 16, 4)[:4] == pytest.approx([2, 4, 6, 8])
    assert _table("rsqrt", 16, 4)[8] == pytest.approx(8 * 2 / 3)
    assert _table("rsqrt", 16, 4)[15] == pytest.approx(4)


@pytest.mark.parametrize("name, second", [("linear", 4.5), ("cosine", 4.5), ("rsqrt", 8 / 2**0.5), ("constant", 8)])
def test_no_warm_up_starts_at_the_peak(name, second):
    # Of 3 updates the middle one is half-way down from 8 to 1.
    assert _table(name, 3, 0, final=0.125)[:2] == pytest.approx([8, second])


@pytest.mark.parametrize("name, last", [("linear", 2.0), ("cosine", 2.0), ("constant", 8.0)])
def test_stays_at_the_final_rate_beyond_the_last_update(name, last):
    assert _table(name, 5, 2, final=0.25, beyond=3)[4:] == pytest.approx([last] * 4)


@pytest.mark.parametrize("name", ["linear", "cosine", "rsqrt", "constant"])
def test_training_that_is_all_warm_up(name):
    assert _table(name, 4, 4) == pytest.approx([2, 4, 6, 8])


def test_works_on_a_traced_count():
    rate = schedule(OptimConfig(schedule="cosine", warmup_steps=3, learning_rate=1.0), 9)
    counts = np.arange(9)
    np.testing.assert_allclose(jax.vmap(rate)(counts), [np.asarray(rate(int(count))) for count in counts], rtol=1e-6)


def test_a_training_that_ends_within_the_warm_up_rises_to_its_end():
    assert _table("cosine", 3, 8) == pytest.approx([1, 2, 3])


@settings(deadline=None, max_examples=10)
@given(
    st.sampled_from(["linear", "cosine", "rsqrt", "constant"]),
    st.integers(0, 30),
    st.integers(1, 60),
    st.floats(0, 1),
)
def test_rises_to_the_peak_and_never_rises_again(name, warmup, more, final):
    config = OptimConfig(schedule=name, warmup_steps=warmup, final_fraction=final, learning_rate=0.5)
    rates = np.asarray(jax.vmap(schedule(config, warmup + more))(np.arange(warmup + more)))
    top = max(warmup, 1) - 1
    assert rates[0] > 0 and rates[top] == pytest.approx(0.5)
    assert np.all(np.diff(rates[: top + 1]) > 0) and np.all(np.diff(rates[top:]) <= 1e-7)
    if name in ("linear", "cosine") and more > 1:
        assert rates[-1] == pytest.approx(0.5 * final, abs=1e-6)
