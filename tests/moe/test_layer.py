"""The composed layer: groups, capacities of training and evaluation, shared experts, types and errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.moe.config import BalanceConfig, MoEConfig
from sparse_lm.moe.dispatch import DISPATCHERS
from sparse_lm.moe.layer import MoE, group_size
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.moe.slots import SlotRule
from sparse_lm.moe.stats import unaccounted
from sparse_lm.nn.mlp import Mlp
from sparse_lm.sharding import DEFAULT

X_BLD = jax.random.normal(jax.random.key(7), (2, 8, 4))
ALL_BL = jnp.ones((2, 8), bool)
run = jax.jit(lambda layer, *inputs: layer(*inputs))

LIMITED = [name for name, cls in DISPATCHERS.items() if cls.has_capacity]


def build(**options: Any) -> MoE:
    config = MoEConfig(**{"num_experts": 4, "top_k": 2, "every": 1, **options})
    return MoE(jax.random.key(0), 4, 6, "relu", config, DEFAULT)


@pytest.mark.parametrize(
    ("configured", "batch", "length", "expected"), [(None, 2, 8, 8), (4, 2, 8, 4), (8, 3, 8, 8), (16, 4, 8, 16)]
)
def test_group_size(configured, batch, length, expected):
    assert group_size(MoEConfig(group_size=configured), batch, length) == expected


@pytest.mark.parametrize(("configured", "batch", "length"), [(3, 2, 8), (12, 2, 8), (16, 3, 8)])
def test_group_size_refuses_what_does_not_fit(configured, batch, length):
    with pytest.raises(ValueError, match=rf"model\.moe\.group_size={configured}.*{length}.*{batch * length} tokens"):
        group_size(MoEConfig(group_size=configured), batch, length)


@pytest.mark.parametrize("name", LIMITED)
def test_dispatcher_has_the_capacity_of_its_mode(name):
    layer = build(dispatcher=name, capacity_factor=1.0, capacity_factor_eval=1.5, priority="token")
    assert isinstance(layer.dispatcher(8, training=True), DISPATCHERS[name])
    assert layer.dispatcher(8, training=True).slots == SlotRule(4, "token")
    assert layer.dispatcher(8, training=False).slots == SlotRule(6, "token")
    dropless = build(capacity_factor=None, router=TopK(renormalise="after_drop"))
    assert dropless.dispatcher(8, training=True).slots == SlotRule(8, "token", renormalise=True)


def test_evaluation_uses_its_own_capacity():
    layer = build(capacity_factor=0.25, capacity_factor_eval=None, router=TopK(init_scale=4.0))
    _, training = run(layer, X_BLD, ALL_BL, jax.random.key(0))
    _, evaluation = run(layer, X_BLD, ALL_BL)
    assert 0 < int(training.dispatch.kept) <= 2 * 4  # one slot for each of four experts in each of two groups
    assert int(evaluation.dispatch.dropped) == 0
    for stats in (training, evaluation):
        assert int(unaccounted(stats, 2)) == 0


@pytest.mark.parametrize(("scope", "units"), [("sequence", 2), ("group", 4), ("global", 4)])
def test_units_of_the_statistics_follow_the_scope(scope, units):
    _, stats = run(build(group_size=4, balance=BalanceConfig(scope=scope)), X_BLD, ALL_BL)
    assert stats.router.load_UE.shape == (units, 4)
    np.testing.assert_array_equal(stats.router.tokens_U, [16 // units] * units)


def test_shared_experts_are_one_wide_layer_that_also_sees_dropped_tokens():
    layer = build(num_shared=3, capacity_factor=0.25)
    assert layer.shared is not None
    assert layer.shared.mlp.up_DF.shape == (4, 18)
    routed = build(num_shared=0, capacity_factor=0.25)
    routed.router, routed.experts = layer.router, layer.experts
    key = jax.random.key(0)
    both, _ = run(layer, X_BLD, ALL_BL, key)
    alone, stats = run(routed, X_BLD, ALL_BL, key)
    np.testing.assert_allclose(both, layer.shared(X_BLD, alone, None), rtol=1e-5, atol=1e-6)
    dropped = np.all(np.asarray(alone) == 0, axis=-1)
    assert dropped.sum() == int(stats.dispatch.served[0]) > 0


def test_one_expert_and_one_choice_is_the_dense_layer():
    layer = build(num_experts=1, top_k=1, capacity_factor=None)
    dense = Mlp(jax.random.key(1), 4, 6, "relu", DEFAULT)
    dense.up_DF[...], dense.down_FD[...] = layer.experts.up_EDF[...][0], layer.experts.down_EFD[...][0]
    np.testing.assert_allclose(run(layer, X_BLD, ALL_BL)[0], dense(X_BLD), rtol=1e-5, atol=1e-6)


def test_padding_alone_gives_zeros_and_empty_statistics():
    y_BLD, stats = run(build(), X_BLD, ~ALL_BL, jax.random.key(0))
    assert np.all(np.asarray(y_BLD) == 0)
    assert int(stats.dispatch.kept) == int(stats.dispatch.dropped) == int(stats.router.load_UE.sum()) == 0
    assert int(stats.router.padding_U.sum()) == 16
    assert int(unaccounted(stats, 2)) == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_type_of_the_input_is_the_type_of_the_output(dtype):
    y_BLD, stats = run(build(num_shared=1), X_BLD.astype(dtype), ALL_BL)
    assert y_BLD.dtype == dtype
    assert stats.router.importance_UE.dtype == jnp.float32


def test_weights_of_router_experts_and_shared_experts_are_drawn_apart():
    layer = build(num_shared=1, num_experts=1, top_k=1)
    assert layer.shared is not None
    assert not np.allclose(layer.shared.mlp.up_DF[...], layer.experts.up_EDF[...][0])
    small = build(init_scale=0.01)
    np.testing.assert_allclose(small.experts.up_EDF[...], 0.1 * build().experts.up_EDF[...], rtol=1e-5)
