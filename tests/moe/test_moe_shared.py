"""How the output of shared experts is added, by hand; what the configuration refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.config import ConfigError
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.shared import SharedExperts
from sparse_lm.sharding import DEFAULT

X_BLD = jnp.asarray([[[1.0, 2.0], [-1.0, 0.5]]])
ROUTED_BLD = jnp.asarray([[[10.0, 20.0], [30.0, 40.0]]])


def build(gate) -> SharedExperts:
    """Two hidden units that copy positive inputs and double them."""
    shared = SharedExperts(jax.random.key(0), (2, 2), "relu", DEFAULT, gate, 0.0)
    shared.mlp.up_DF[...], shared.mlp.down_FD[...] = jnp.eye(2), 2 * jnp.eye(2)
    return shared


def test_without_a_gate_the_outputs_are_added():
    shared = build("none")
    assert shared.mix_DK is None
    np.testing.assert_allclose(shared(X_BLD, ROUTED_BLD, None), [[[12.0, 24.0], [30.0, 41.0]]])


def test_a_sigmoid_scales_the_shared_output_alone():
    shared = build("sigmoid")
    assert shared.mix_DK is not None
    shared.mix_DK[...] = jnp.asarray([[np.log(3.0)], [0.0]])  # sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4
    np.testing.assert_allclose(shared(X_BLD, ROUTED_BLD, None), [[[11.5, 23.0], [30.0, 40.25]]], rtol=1e-6)


def test_a_mix_weighs_both_outputs_with_weights_that_sum_to_one():
    shared = build("mix")
    assert shared.mix_DK is not None
    shared.mix_DK[...] = jnp.asarray([[np.log(3.0), 0.0], [0.0, 0.0]])  # 3/4 routed; 1/4 at the second token
    np.testing.assert_allclose(shared(X_BLD, ROUTED_BLD, None), [[[8.0, 16.0], [7.5, 10.75]]], rtol=1e-6)


@pytest.mark.parametrize("gate", ["sigmoid", "mix"])
def test_the_gate_is_learned_and_keeps_the_dtype(gate):
    shared = build(gate)
    half = shared(X_BLD.astype(jnp.bfloat16), ROUTED_BLD.astype(jnp.bfloat16), None)
    assert half.dtype == jnp.bfloat16
    gradient = jax.grad(lambda shared: jnp.sum(shared(X_BLD, ROUTED_BLD, None)))(shared)
    assert jnp.all(gradient.mix_DK[...] != 0)


@pytest.mark.parametrize(("option", "value"), [("d_shared", 8), ("shared_gate", "mix")])
def test_options_of_shared_experts_need_shared_experts(option, value):
    with pytest.raises(ConfigError, match=f"{option}.*num_shared"):
        MoEConfig(**{option: value})
    assert MoEConfig(num_shared=1, d_shared=3).shared_width(7) == 3
    assert MoEConfig(num_shared=2).shared_width(7) == 14
    assert MoEConfig().shared_width(7) == 0
