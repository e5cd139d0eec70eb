"""Mixture of attention heads against loops in float64, its statistics by hand, and what it refuses."""

from __future__ import annotations

import attention_cases as cases
import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.config import ConfigError, from_dict, to_config_dict, to_dict
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.attention.mixture import Mixture, MixtureAttention
from sparse_lm.moe.routers.expert_choice import ExpertChoice
from sparse_lm.moe.routers.hash import Hash
from sparse_lm.moe.routers.relu import Relu
from sparse_lm.moe.routers.sigmoid import Sigmoid, SigmoidRouter
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.moe.stats import unaccounted
from sparse_lm.nn.attention import Attention
from sparse_lm.nn.heads import AttentionShape
from sparse_lm.sharding import DEFAULT

ROUTER = TopK(gate="softmax_after", init_scale=4.0)
SHAPES = {"jetmoe": (3, 2, 4, 2), "moa": (5, 3, 3, 1), "grouped": (4, 2, 8, 2)}  # experts, top-k, heads, kv heads


def build(name: str = "jetmoe", dropout: float = 0.0, **options) -> MixtureAttention:
    experts, top_k, heads, kv_heads = SHAPES[name]
    config = Mixture(num_experts=experts, top_k=top_k, **{"router": ROUTER, **options})
    layer = cases.build(config, heads, kv_heads, dropout)
    assert isinstance(layer, MixtureAttention)
    return layer


def reference(top_k):
    return lambda weights, x: oracle.mixture(weights, x, cases.SEGMENTS, cases.POSITIONS, top_k)


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_loops(name):
    layer, top_k = build(name), SHAPES[name][1]
    y_BLD, cache, stats = cases.call(layer)
    expected, choices = reference(top_k)(cases.weights_of(layer), cases.X)
    np.testing.assert_allclose(y_BLD, expected, rtol=1e-5, atol=1e-5)
    assert cache is None
    assert np.all(np.asarray(y_BLD)[~cases.REAL] == 0)
    load = np.zeros((2, SHAPES[name][0]), int)
    for (row, _), (experts, _) in choices.items():
        np.add.at(load[row], experts, 1)
    np.testing.assert_array_equal(stats.router.load_UE, load)
    np.testing.assert_array_equal(stats.router.tokens_U, [6, 4])
    np.testing.assert_array_equal(stats.router.padding_U, [0, 2])
    assert int(stats.dispatch.kept) == 10 * top_k and int(stats.dispatch.dropped) == 0
    assert int(unaccounted(stats, top_k)) == 0
    np.testing.assert_allclose(stats.dispatch.gate_mass, sum(gates.sum() for _, gates in choices.values()), rtol=1e-5)


@pytest.mark.parametrize("name", ["jetmoe", "grouped"])
def test_gradients_are_the_slopes_of_the_loops(name):
    cases.assert_gradients(build(name), reference(SHAPES[name][1]))


def test_one_expert_is_grouped_query_attention():
    """With one expert the gate is 1 (softmax over one), and all that is left is the attention of `nn`."""
    config = Mixture(num_experts=1, top_k=1, router=TopK())
    layer = cases.build(config, 4, 2)
    assert isinstance(layer, MixtureAttention)
    plain = Attention(jax.random.key(0), AttentionShape(cases.WIDTH, 4, 2, 4, oracle.ROPE_BASE), DEFAULT)
    plain.query_DHI[...], plain.out_HID[...] = layer.query_EDHI[...][0], layer.out_EHID[...][0]
    plain.key_DJI[...], plain.value_DJI[...] = layer.key_DJI[...], layer.value_DJI[...]
    seen = cases.inputs()
    expected, _ = plain(jnp.asarray(cases.X, jnp.float32), seen.positions_BL, seen.sight)
    got = np.asarray(cases.call(layer)[0])
    np.testing.assert_allclose(got[cases.REAL], np.asarray(expected)[cases.REAL], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("router", "total"),
    [
        (TopK(renormalise="after_drop", second_expert="threshold", second_threshold=0.3, init_scale=4.0), 1.0),
        (Sigmoid(init_scale=4.0), 2.5),
        (Hash(gate="mean"), 1.0),
        (Relu(init_scale=4.0), None),
    ],
)
def test_other_routers_choose_too(router, total):
    """total: what the gates of a token sum to, which scales the output of experts that are all the same."""
    layer = build(router=router)
    for name in ("query_EDHI", "out_EHID"):
        weight = getattr(layer, name)
        weight[...] = jnp.broadcast_to(weight[...][:1], weight[...].shape)
    y_BLD, _, stats = cases.call(layer)
    width = stats.dispatch.served.shape[-1] - 1
    assert int(unaccounted(stats, width)) == 0
    assert np.all(np.isfinite(y_BLD))
    if total is None:
        assert int(stats.router.declined_U.sum()) > 0
        return
    one = build(router=Hash(gate="mean"))
    for name in ("query_EDHI", "out_EHID", "key_DJI", "value_DJI"):
        getattr(one, name)[...] = getattr(layer, name)[...]
    expected, _, _ = cases.call(one)
    np.testing.assert_allclose(y_BLD, total * np.asarray(expected), rtol=1e-4, atol=1e-5)


def test_a_state_follows_the_loads():
    layer = build(router=Sigmoid(bias_rate=0.1, init_scale=4.0))
    stats = cases.call(layer)[2]
    whole = jax.tree.map(lambda leaf: leaf.sum(0, keepdims=True), stats.router)
    updated = layer.with_updated_router(type(stats)(whole, stats.dispatch))
    load = np.asarray(stats.router.load_UE).sum(0)
    assert isinstance(updated.router, SigmoidRouter) and isinstance(layer.router, SigmoidRouter)
    np.testing.assert_allclose(updated.router.bias_E[...], 0.1 * np.sign(load.mean() - load), rtol=1e-6)
    np.testing.assert_array_equal(layer.router.bias_E[...], 0)


def test_dropout_needs_a_key():
    layer = build(dropout=0.5)
    once, again = (cases.call(layer, key=jax.random.key(seed))[0] for seed in (1, 2))
    assert not np.allclose(once, again)
    np.testing.assert_array_equal(cases.call(layer)[0], cases.call(build())[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixture(num_experts=2, top_k=3), r"top_k=3: must be at most num_experts=2"),
        (lambda: Mixture(router=ExpertChoice()), r"router\.kind='expert_choice'.*causal router"),
        (lambda: Mixture(top_k=1), r"router\.gate='softmax_after'.*learns nothing"),
        (lambda: Mixture(router=Sigmoid(gate_on="input")), r"router\.gate_on='input'.*use output"),
        (lambda: ModelConfig(attention=Mixture()), r"num_heads=4: must be a multiple of attention\.top_k"),
        (lambda: ModelConfig(num_heads=6, num_kv_heads=2, head_dim=4, attention=Mixture()), r"num_heads=6"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_hash_routing_has_no_balance_losses():
    losses = Mixture(router=Hash()).losses
    assert (losses.load, losses.z) == (0, 0)
    assert Mixture().losses.load > 0


def test_survives_dictionaries():
    config = ModelConfig(num_kv_heads=2, attention=Mixture(num_experts=3, router=Sigmoid()))
    assert from_dict(ModelConfig, to_dict(config)) == config
    assert from_dict(ModelConfig, to_config_dict(config)) == config
    assert from_dict(ModelConfig, to_config_dict(ModelConfig())).attention is None
    with pytest.raises(ConfigError, match=r"attention\.kind='mix'.*did you mean 'mixture'"):
        from_dict(ModelConfig, {"attention": {"kind": "mix"}})
