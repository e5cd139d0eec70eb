"""Stretched rotary frequencies: by hand at the ends of each kind, and in the rotation itself."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.config import ConfigError, from_dict
from sparse_lm.nn.config import HeadsConfig
from sparse_lm.nn.position import rotary
from sparse_lm.nn.rope_scaling import Llama3, LongRope, Yarn

BASE, HALF = 10_000.0, 32
FREQUENCY = BASE ** (-np.arange(HALF) / HALF)


def test_yarn_by_hand():
    # Pair of 32 turns: 32 ln(4096 / (64 pi)) / ln 10000 = 10.47 -> 10; of one turn: 22.51 -> 23.
    stretched = Yarn(factor=40, original_length=4096).stretched(FREQUENCY, BASE)
    np.testing.assert_allclose(stretched[:11], FREQUENCY[:11])
    np.testing.assert_allclose(stretched[23:], FREQUENCY[23:] / 40)
    share = (15 - 10) / 13
    assert stretched[15] == pytest.approx(FREQUENCY[15] * (1 - share + share / 40))
    between = Yarn(factor=40, original_length=4096, truncate=False).stretched(FREQUENCY, BASE)
    low, high = (HALF * math.log(4096 / (turns * 2 * math.pi)) / math.log(BASE) for turns in (32, 1))
    share = (15 - low) / (high - low)
    assert between[15] == pytest.approx(FREQUENCY[15] * (1 - share + share / 40))


def test_yarn_amplitudes():
    assert Yarn(factor=32).amplitude == pytest.approx(0.1 * math.log(32) + 1)  # gpt-oss: 1.3466
    assert Yarn(factor=32).score_factor == 1
    deepseek = Yarn(factor=40, mscale=1.0, mscale_all_dim=1.0)
    assert deepseek.amplitude == 1
    assert deepseek.score_factor == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    assert Yarn(factor=1).amplitude == 1


def test_llama3_by_hand():
    scaling = Llama3(factor=8, low_freq_factor=1, high_freq_factor=4, original_length=8192)
    turns = 8192 * FREQUENCY / (2 * math.pi)
    stretched = scaling.stretched(FREQUENCY, BASE)
    np.testing.assert_allclose(stretched[turns > 4], FREQUENCY[turns > 4])
    np.testing.assert_allclose(stretched[turns < 1], FREQUENCY[turns < 1] / 8)
    (between,) = np.flatnonzero((turns > 1) & (turns < 4))[:1]
    stays = (turns[between] - 1) / 3
    assert stretched[between] == pytest.approx(FREQUENCY[between] * (stays + (1 - stays) / 8))


def test_longrope_divides_each_frequency():
    scaling = LongRope(divisors=(1.0, 2.0), gain=1.5)
    np.testing.assert_allclose(scaling.stretched(np.array([1.0, 0.1]), BASE), [1, 0.05])
    assert scaling.amplitude == 1.5
    with pytest.raises(ConfigError, match=r"2.*divisors are given and a head rotates 3 pairs"):
        scaling.stretched(np.ones(3), BASE)


def test_rotation_with_a_scaling():
    # One pair, turned by 3 positions of 1 / 2 radian each, and made longer by half.
    x = jnp.asarray([1.0, 0.0])[None, None, None]
    turned = rotary(x, jnp.asarray([[3]]), BASE, LongRope(divisors=(2.0,), gain=1.5))
    np.testing.assert_allclose(turned[0, 0, 0], [1.5 * math.cos(1.5), 1.5 * math.sin(1.5)], rtol=1e-6)


@pytest.mark.parametrize(
    "scaling", [Yarn(factor=1, mscale=1.0, mscale_all_dim=1.0), Llama3(factor=1), LongRope((1.0, 1.0))]
)
def test_a_factor_of_one_changes_nothing(scaling):
    x, positions = jnp.arange(24.0).reshape(1, 3, 2, 4), jnp.asarray([[0, 1, 5]])
    np.testing.assert_allclose(rotary(x, positions, 100.0, scaling), rotary(x, positions, 100.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "yarn", "beta_fast": 1.0, "beta_slow": 2.0}, "beta_fast=1.0: must be greater than beta_slow=2.0"),
        ({"kind": "yarn", "mscale": 1.0}, "mscale=1.0: goes with mscale_all_dim"),
        ({"kind": "longrope"}, "divisors=.*must be positive numbers"),
        ({"kind": "llama3", "high_freq_factor": 1.0}, "high_freq_factor=1.0: must be greater than low_freq_factor=1.0"),
        ({"kind": "yern"}, "did you mean 'yarn'"),
    ],
)
def test_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(HeadsConfig, {"rope_scaling": values})
