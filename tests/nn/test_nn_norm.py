"""Norms against their formulas, in every dtype and away from zero mean and unit scale."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.nn.norm import Norm
from sparse_lm.sharding import DEFAULT

X_BLD = 3 * jax.random.normal(jax.random.key(0), (2, 3, 16)) + 5
SCALE, BIAS = jnp.linspace(0.5, 2.0, 16), jnp.linspace(-1.0, 1.0, 16)


def expected(kind: str, x) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if kind == "layernorm":
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * np.asarray(SCALE) + np.asarray(BIAS)
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * np.asarray(SCALE)


def build(kind: str) -> Norm:
    norm = Norm(kind, 16, DEFAULT)
    norm.scale_D[...] = SCALE
    if norm.bias_D is not None:
        norm.bias_D[...] = BIAS
    return norm


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_formula(kind):
    np.testing.assert_allclose(build(kind)(X_BLD), expected(kind, X_BLD), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_bfloat16_is_computed_in_float32(kind):
    x_BLD = X_BLD.astype(jnp.bfloat16)
    y_BLD = build(kind)(x_BLD)
    assert y_BLD.dtype == jnp.bfloat16
    exact = jnp.asarray(expected(kind, x_BLD), jnp.float32).astype(jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(y_BLD, np.float32), np.asarray(exact, np.float32), rtol=2**-7)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_zeros_stay_finite_in_value_and_gradient(kind):
    norm = Norm(kind, 16, DEFAULT)
    zeros = jnp.zeros((1, 1, 16))
    np.testing.assert_array_equal(norm(zeros), zeros)
    assert np.all(np.isfinite(jax.grad(lambda x: norm(x).sum())(zeros)))


def test_only_layernorm_has_a_bias_and_ignores_the_mean():
    rms, layer = Norm("rmsnorm", 16, DEFAULT), Norm("layernorm", 16, DEFAULT)
    assert rms.bias_D is None
    assert layer.bias_D is not None
    np.testing.assert_allclose(layer(X_BLD + 100), layer(X_BLD), atol=1e-3)
    assert not np.allclose(rms(X_BLD + 100), rms(X_BLD), atol=1e-1)
    np.testing.assert_allclose(rms(7 * X_BLD), rms(X_BLD), rtol=1e-5)
