"""Free experts: what each computes by hand, on outputs and inputs; gates, accounting, slots, balance, refusals."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.config import ConfigError, from_dict
from sparse_lm.moe.balance import load_balance
from sparse_lm.moe.config import BalanceConfig, MoEConfig
from sparse_lm.moe.free import FreeExperts, combine
from sparse_lm.moe.layer import MoE
from sparse_lm.moe.routers import ROUTERS
from sparse_lm.moe.routers.hash import Hash
from sparse_lm.moe.routers.sigmoid import Sigmoid
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.moe.stats import unaccounted
from sparse_lm.moe.types import RouterStats, TokenChoice
from sparse_lm.sharding import DEFAULT

X_D = np.array([1.0, -2.0], np.float32)
VECTOR_D = np.array([10.0, 20.0], np.float32)


def experts(numbers=(1, 1, 1), first=4) -> FreeExperts:
    """Four feed-forward experts come first; the mix of the constant expert is known: logits x1, 0."""
    free = FreeExperts(jax.random.key(0), 2, first, numbers, DEFAULT)
    if free.mix_EDK is not None and free.vector_ED is not None:
        free.mix_EDK[...] = jnp.asarray([[[1.0, 0.0], [0.0, 0.0]]])
        free.vector_ED[...] = jnp.asarray([VECTOR_D])
    return free


def choice(expert_SK, gate_SK, gate_on: Literal["output", "input"] = "output") -> TokenChoice:
    """A decision of one group."""
    return TokenChoice(jnp.asarray([expert_SK], jnp.int32), jnp.asarray([gate_SK], jnp.float32), gate_on=gate_on)


def sigmoid(value):
    return 1 / (1 + np.exp(-value))


@pytest.mark.parametrize(
    ("expert", "expected"),
    [
        (3, np.zeros(2)),  # a feed-forward one: not its business
        (4, np.zeros(2)),
        (5, 0.5 * X_D),
        (6, 0.5 * (sigmoid(1.0) * X_D + sigmoid(-1.0) * VECTOR_D)),
        (-1, np.zeros(2)),
    ],
)
def test_each_kind_by_hand(expert, expected):
    y_GSD = experts()(jnp.asarray(X_D)[None, None], choice([[expert]], [[0.0 if expert < 0 else 0.5]]))
    np.testing.assert_allclose(y_GSD[0, 0], expected, rtol=1e-6)


def test_a_gate_on_the_input_scales_what_the_expert_sees():
    """E(g x): a copy is g x, and of a constant expert the mix sees g x while v keeps its length."""
    decision = choice([[5, 6]], [[0.25, 0.5]], "input")
    y_D = experts()(jnp.asarray(X_D)[None, None], decision)[0, 0]
    expected = 0.25 * X_D + sigmoid(0.5) * 0.5 * X_D + sigmoid(-0.5) * VECTOR_D
    np.testing.assert_allclose(y_D, expected, rtol=1e-6)


def test_without_constant_experts_there_are_no_weights():
    free = experts((2, 1, 0))
    assert free.mix_EDK is None and free.vector_ED is None
    y_GSD = free(jnp.ones((1, 1, 2)), choice([[4, 5, 6]], [[0.5, 0.3, 0.2]]))
    np.testing.assert_allclose(y_GSD[0, 0], [0.2, 0.2], rtol=1e-6)


def test_the_split_of_a_decision():
    decision = choice([[0, 5], [6, 3], [-1, -1]], [[0.6, 0.4], [0.7, 0.3], [0.0, 0.0]])
    others, chosen = experts().others(decision), experts().chosen(decision)
    np.testing.assert_array_equal(others.expert_GSK[0], [[0, -1], [-1, 3], [-1, -1]])
    np.testing.assert_allclose(others.gate_GSK[0], [[0.6, 0.0], [0.0, 0.3], [0.0, 0.0]])
    np.testing.assert_array_equal(chosen[0], [[False, True], [True, False], [False, False]])


@pytest.mark.parametrize(("kept", "divisor"), [(True, 0.8), (False, 0.2)])
def test_gates_are_renormalised_over_all_that_is_kept(kept, divisor):
    """The copy, gate 0.2, is always kept; the feed-forward expert, gate 0.6, where it found a slot."""
    decision = choice([[0, 5]], [[0.6, 0.2]])
    x_GSD = jnp.asarray(X_D)[None, None]
    y_GSD = 0.6 * 3 * x_GSD if kept else 0 * x_GSD
    kept_GSK = jnp.asarray([[[kept, False]]])
    total_GSD, all_GSK = combine(experts(), x_GSD, decision, y_GSD, kept_GSK, renormalise=True)
    np.testing.assert_allclose(total_GSD[0, 0], (1.8 * kept + 0.2) * X_D / divisor, rtol=1e-6)
    np.testing.assert_array_equal(all_GSK[0, 0], [kept, True])
    plain_GSD, _ = combine(experts(), x_GSD, decision, y_GSD, kept_GSK, renormalise=False)
    np.testing.assert_allclose(plain_GSD[0, 0], (1.8 * kept + 0.2) * X_D, rtol=1e-6)


def test_padding_stays_zero_and_the_dtype_is_that_of_x():
    x_GSD = jnp.asarray(X_D, jnp.bfloat16)[None, None]
    y_GSD, kept_GSK = combine(
        experts(), x_GSD, choice([[-1]], [[0.0]]), 0 * x_GSD, jnp.zeros((1, 1, 1), bool), renormalise=True
    )
    assert y_GSD.dtype == jnp.bfloat16 and not np.any(y_GSD) and not np.any(kept_GSK)


def config(**options) -> MoEConfig:
    """Four feed-forward experts and one free expert of each kind."""
    return MoEConfig(**{"num_experts": 4, "top_k": 2, "num_zero": 1, "num_copy": 1, "num_constant": 1, **options})


def test_accounting_in_a_layer_that_drops():
    layer = MoE(jax.random.key(0), 8, 4, "relu", config(capacity_factor=0.25, router=TopK(init_scale=4.0)), DEFAULT)
    x_BLD = jax.random.normal(jax.random.key(1), (4, 16, 8))
    mask_BL = jnp.ones((4, 16), bool).at[1, 9:].set(False)
    y_BLD, stats = layer(x_BLD, mask_BL, jax.random.key(2))
    assert int(unaccounted(stats, 2)) == 0
    assert int(stats.dispatch.dropped) > 0
    load_E = np.asarray(stats.router.load_UE.sum(0))
    assert load_E.shape == (7,) and load_E.sum() == 2 * int(mask_BL.sum())
    assert int(stats.dispatch.kept) >= load_E[4:].sum()
    assert not np.any(y_BLD[1, 9:])


def test_a_token_whose_experts_are_all_zero_ones_comes_out_as_zero():
    layer = MoE(jax.random.key(0), 8, 4, "relu", config(num_zero=2, num_copy=0, num_constant=0), DEFAULT)
    layer.router.scores.weight_DE[...] = jnp.zeros((8, 6)).at[:, 4:].set(1.0)  # type: ignore[attr-defined]
    y_BLD, stats = layer(jnp.ones((1, 4, 8)), jnp.ones((1, 4), bool))
    assert not np.any(y_BLD)
    np.testing.assert_array_equal(stats.dispatch.served, [0, 0, 4])  # served, by experts that give nothing


def test_slots_are_those_of_the_paper():
    """gamma tau k T / (tau N_F + N_Z) = 1.1 * 0.75 * 2 * 100 / (0.75 * 8 + 4) = 16.5, rounded up."""
    paper = config(num_experts=8, num_constant=2, free_share=0.75, capacity_factor=1.1)
    layer = MoE(jax.random.key(0), 8, 4, "relu", paper, DEFAULT)
    assert layer.dispatcher(100, training=True).slots.capacity == 17
    assert paper.worth == pytest.approx(8 + 4 / 0.75)
    assert paper.expected == pytest.approx(2 * 0.75 * 8 / (0.75 * 8 + 4)) == 1.2
    without = MoEConfig(num_experts=8, top_k=2)
    assert (without.worth, without.expected, without.num_choices) == (8, 2, 8)


def test_the_balance_loss_is_one_at_its_target_and_weighs_free_experts_less():
    """Two feed-forward experts and one free one worth half: loads 1, 1, 2."""
    weights = (1.0, 1.0, 0.5)

    def loss(load_E, probability_E):
        zero = jnp.zeros((1, 1))
        stats = RouterStats(
            zero, zero, zero, jnp.asarray([[load_E]]), 8 * jnp.asarray([[probability_E]]), zero, zero, zero
        )
        return float(load_balance(stats, jnp.asarray(8), None, weights)[0])

    assert loss([2, 2, 4], [0.25, 0.25, 0.5]) == pytest.approx(1.0)
    assert loss([8, 0, 0], [1.0, 0.0, 0.0]) == pytest.approx(4.0)  # sum of 1 / weights
    assert loss([0, 0, 8], [0.0, 0.0, 1.0]) == pytest.approx(2.0)
    # (1 + 1 + 2) * (0.5 * 0.25 + 0.25 * 0.25 + 0.5 * 0.25 * 0.5)
    assert loss([4, 2, 2], [0.25, 0.25, 0.5]) == pytest.approx(1.0)
    assert loss([4, 2, 2], [0.5, 0.25, 0.25]) == pytest.approx(4 * (0.25 + 0.0625 + 0.03125))


def test_the_weights_reach_the_losses_of_a_model_only_where_they_matter():
    losses = config(free_share=0.5, balance=BalanceConfig(load=0.3, scope="group")).losses
    assert losses.expert_weights == (1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5)  # type: ignore[attr-defined]
    assert (losses.load, losses.scope, losses.weights["load"]) == (0.3, "group", 0.3)
    assert config().losses == BalanceConfig()


def test_a_config_goes_to_a_dictionary_and_back():
    one = config(free_share=0.5)
    assert from_dict(MoEConfig, {**dataclasses.asdict(one), "router": {"kind": "top_k"}, "balance": {}}) == one


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"router": Hash()}, "router.kind"),
        ({"num_zero": 0, "num_copy": 0, "num_constant": 0, "free_share": 0.5}, "free_share"),
        ({"top_k": 8}, "top_k"),
        ({"free_share": 0.0}, "free_share"),
        ({"num_copy": -1}, "num_copy"),
        ({"router": Sigmoid(scale=1.0, renormalise="after_drop", gate_on="input")}, "router.renormalise"),
    ],
)
def test_refusals(options, key):
    with pytest.raises(ConfigError) as caught:
        config(**options)
    assert caught.value.key == key


def test_which_routers_take_free_experts():
    """Those that hand experts equal shares, or have no scores, do not."""
    takers = {kind for kind, router in ROUTERS.items() if router.takes_free}
    assert takers == {"top_k", "sigmoid", "relu", "noisy_top_k", "fixed_noise", "sparse_mixer"}
    for kind in takers:
        layer = MoE(jax.random.key(0), 8, 4, "relu", config(router=ROUTERS[kind](), capacity_factor=None), DEFAULT)
        _, stats = layer(jax.random.normal(jax.random.key(1), (2, 8, 8)), jnp.ones((2, 8), bool), jax.random.key(2))
        assert int(unaccounted(stats, stats.dispatch.served.shape[-1] - 1)) == 0, kind
        assert stats.router.load_UE.shape[-1] == 7
