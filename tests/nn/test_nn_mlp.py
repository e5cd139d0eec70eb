"""The dense layer and its activations against their formulas."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.nn.mlp import ACTIVATIONS, GATED, Mlp, activate
from sparse_lm.sharding import DEFAULT

X_BLD = jax.random.normal(jax.random.key(1), (2, 3, 4))


def gelu(v):
    return 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


FORMULAS = {
    "relu": lambda up, gate: np.maximum(up, 0),
    "gelu": lambda up, gate: gelu(up),
    "geglu": lambda up, gate: gelu(gate) * up,
    "swiglu": lambda up, gate: gate / (1 + np.exp(-gate)) * up,
    "clamped_swiglu": lambda up, gate: (
        np.minimum(gate, 7) / (1 + np.exp(-1.702 * np.minimum(gate, 7))) * (np.clip(up, -7, 7) + 1)
    ),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation(kind):
    up, gate = np.linspace(-9, 9, 13), np.linspace(8, -8, 13)
    # Optimised, as it is used: what the tests' flags make of 1 + tanh is off by an ulp of 1 where it should vanish.
    function = jax.jit(activate, static_argnums=0, compiler_options={"xla_backend_optimization_level": 2})
    got = function(kind, jnp.asarray(up), jnp.asarray(gate) if kind in GATED else None)
    np.testing.assert_allclose(got, FORMULAS[kind](up, gate), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_layer(kind):
    layer = Mlp(jax.random.key(0), 4, 6, kind, DEFAULT)
    x, up, down = (np.asarray(w, np.float64) for w in (X_BLD, layer.up_DF[...], layer.down_FD[...]))
    gate = x @ np.asarray(layer.gate_DF[...], np.float64) if layer.gate_DF is not None else None
    np.testing.assert_allclose(layer(X_BLD), FORMULAS[kind](x @ up, gate) @ down, rtol=1e-4, atol=1e-6)
    assert (layer.gate_DF is not None) == (kind in GATED)
    assert layer(X_BLD.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_dropout_is_of_the_hidden_values_in_training_only():
    layer, plain = (Mlp(jax.random.key(0), 4, 6, "gelu", DEFAULT, rate) for rate in (0.5, 0.0))
    np.testing.assert_array_equal(layer(X_BLD), plain(X_BLD))
    layer.down_FD[...] = jnp.eye(6, 4)
    hidden = np.asarray(layer(X_BLD, jax.random.key(3)))
    plain.down_FD[...] = jnp.eye(6, 4)
    kept = hidden != 0
    assert 0 < kept.mean() < 1
    np.testing.assert_allclose(hidden[kept], 2 * np.asarray(plain(X_BLD))[kept], rtol=1e-5)


def test_initial_values():
    layer = Mlp(jax.random.key(0), 64, 256, "swiglu", DEFAULT)
    assert layer.gate_DF is not None
    for weight, fan_in in ((layer.up_DF, 64), (layer.gate_DF, 64), (layer.down_FD, 256)):
        np.testing.assert_allclose(np.std(weight[...]), fan_in**-0.5, rtol=0.03)
    assert not np.array_equal(layer.up_DF[...], layer.gate_DF[...])
