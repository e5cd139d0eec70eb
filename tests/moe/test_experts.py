"""Stacked experts against a loop over them; expert dropout; initial values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.moe.experts import Experts
from sparse_lm.nn.mlp import ACTIVATIONS, GATED, Mlp
from sparse_lm.sharding import DEFAULT

SIZES = (3, 4, 6)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_each_expert_is_a_dense_layer_with_its_own_weights(kind):
    experts = Experts(jax.random.key(0), SIZES, kind)
    x_EXD = jax.random.normal(jax.random.key(1), (3, 5, 4))
    y_EXD = experts(x_EXD)
    for e in range(3):
        dense = Mlp(jax.random.key(9), 4, 6, kind, DEFAULT)
        dense.up_DF[...], dense.down_FD[...] = experts.up_EDF[...][e], experts.down_EFD[...][e]
        if dense.gate_DF is not None and experts.gate_EDF is not None:
            dense.gate_DF[...] = experts.gate_EDF[...][e]
        np.testing.assert_allclose(y_EXD[e], dense(x_EXD[e][None])[0], rtol=2e-5, atol=1e-6)
    assert (experts.gate_EDF is not None) == (kind in GATED)


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_initial_values_are_scaled_by_each_fan_in(scale):
    experts = Experts(jax.random.key(0), (8, 32, 64), "swiglu", scale)
    assert experts.gate_EDF is not None
    for weight, fan_in in ((experts.up_EDF, 32), (experts.gate_EDF, 32), (experts.down_EFD, 64)):
        std = (scale / fan_in) ** 0.5
        np.testing.assert_allclose(np.std(weight[...]), std, rtol=0.03)
        np.testing.assert_allclose(np.std(np.asarray(weight[...]), axis=(1, 2)), std, rtol=0.1)
    assert not np.array_equal(experts.up_EDF[...], experts.gate_EDF[...])
    assert not np.array_equal(experts.up_EDF[...][0], experts.up_EDF[...][1])


def hidden_of(experts: Experts) -> Experts:
    """The same experts with a down projection that shows the hidden values."""
    experts.down_EFD[...] = jnp.broadcast_to(jnp.eye(6, 4), (3, 6, 4))
    return experts


def test_dropout_hits_the_share_it_says_and_keeps_the_mean():
    experts = hidden_of(Experts(jax.random.key(0), SIZES, "relu", dropout_rate=0.25))
    experts.up_EDF[...] = jnp.ones_like(experts.up_EDF[...])
    x_EXD = jnp.ones((3, 2000, 4))
    ids_EX = jnp.arange(6000).reshape(3, 2000)
    y_EXD = np.asarray(experts(x_EXD, ids_EX, jax.random.key(2)))
    np.testing.assert_allclose(np.mean(y_EXD == 0), 0.25, atol=0.015)
    np.testing.assert_allclose(y_EXD[y_EXD != 0], 4 / 0.75, rtol=1e-6)


def test_dropout_follows_the_row_number_and_the_key():
    experts = Experts(jax.random.key(0), SIZES, "gelu", dropout_rate=0.5)
    x_EXD = jax.random.normal(jax.random.key(1), (3, 5, 4))
    ids_EX = jnp.arange(15).reshape(3, 5)
    y_EXD = experts(x_EXD, ids_EX, jax.random.key(2))
    order = jnp.asarray([3, 0, 4, 2, 1])
    np.testing.assert_allclose(
        experts(x_EXD[:, order], ids_EX[:, order], jax.random.key(2)), y_EXD[:, order], rtol=1e-6
    )
    assert not np.allclose(experts(x_EXD, ids_EX + 1, jax.random.key(2)), y_EXD)
    assert not np.allclose(experts(x_EXD, ids_EX, jax.random.key(3)), y_EXD)


def test_evaluation_drops_nothing():
    dropping, plain = (Experts(jax.random.key(0), SIZES, "gelu", dropout_rate=rate) for rate in (0.5, 0.0))
    x_EXD = jax.random.normal(jax.random.key(1), (3, 5, 4))
    np.testing.assert_array_equal(dropping(x_EXD), plain(x_EXD))
    np.testing.assert_array_equal(plain(x_EXD, jnp.zeros((3, 5), jnp.int32), jax.random.key(0)), plain(x_EXD))
