"""Dropout: rate, scale and independence of the mesh. Initial values: spread, cut and independence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.nn.dropout import dropout, split_keys
from sparse_lm.nn.init import TRUNCATED_STD, fan_in_normal
from sparse_lm.sharding import DEFAULT


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_rate_and_scale(rate):
    y = np.asarray(dropout(jnp.ones((100, 200)), rate, jax.random.key(0)))
    np.testing.assert_allclose(np.mean(y == 0), rate, atol=0.01)
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)


def test_dropout_is_off_without_a_key_or_a_rate():
    x = jnp.arange(6.0)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


def test_dropout_keeps_the_type():
    assert dropout(jnp.ones((4, 4), jnp.bfloat16), 0.3, jax.random.key(0)).dtype == jnp.bfloat16


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "model": 2}])
def test_the_mask_does_not_depend_on_the_mesh(mesh_of, sizes):
    x = jax.random.normal(jax.random.key(1), (8, 4, 16))
    expected = dropout(x, 0.4, jax.random.key(2))
    with jax.set_mesh(mesh_of(**sizes)):
        stored = DEFAULT.constrain(x, "BLF")
        got = jax.jit(lambda x: dropout(x, 0.4, jax.random.key(2)))(stored)
        assert jax.typeof(got).sharding.spec == jax.typeof(stored).sharding.spec
        np.testing.assert_array_equal(got, expected)


def test_split_keys():
    assert split_keys(None, 3) == [None, None, None]
    keys = split_keys(jax.random.key(0), 3)
    assert len({jax.random.key_data(key).tobytes() for key in keys if key is not None}) == 3


@pytest.mark.parametrize(("fan_in", "scale"), [(64, 1.0), (64, 0.1), (1, 0.02**2)])
def test_standard_deviation_is_exact(fan_in, scale):
    weights = np.asarray(fan_in_normal(jax.random.key(0), (400, 500), fan_in, scale))
    std = (scale / fan_in) ** 0.5
    np.testing.assert_allclose(weights.std(), std, rtol=0.01)
    np.testing.assert_allclose(weights.mean(), 0, atol=0.01 * std)
    assert np.abs(weights).max() <= 2 * std / TRUNCATED_STD * (1 + 1e-6)
    assert weights.dtype == np.float32


def test_the_constant_is_the_deviation_of_a_cut_normal():
    points = np.linspace(-2, 2, 200_001)
    density = np.exp(-(points**2) / 2)
    np.testing.assert_allclose(TRUNCATED_STD, np.sqrt(np.sum(points**2 * density) / np.sum(density)), rtol=1e-5)
