"""SwitchHead against loops in float64, its statistics by hand, and what it refuses."""

from __future__ import annotations

import attention_cases as cases
import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.config import ConfigError, from_dict, to_config_dict
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.attention import ATTENTIONS
from sparse_lm.moe.attention.switch_head import SwitchHead, SwitchHeadAttention
from sparse_lm.moe.balance import load_balance, z_loss
from sparse_lm.moe.stats import unaccounted

HEADS, EXPERTS = 2, 3


def build(top_k: int = 2, dropout: float = 0.0) -> SwitchHeadAttention:
    layer = cases.build(SwitchHead(num_experts=EXPERTS, top_k=top_k, router_scale=4.0), HEADS, HEADS, dropout)
    assert isinstance(layer, SwitchHeadAttention)
    return layer


def reference(top_k):
    return lambda weights, x: oracle.switch_head(weights, x, cases.SEGMENTS, cases.POSITIONS, top_k)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_equals_the_loops(top_k):
    layer = build(top_k)
    y_BLD, _, stats = cases.call(layer)
    expected, choices = reference(top_k)(cases.weights_of(layer), cases.X)
    np.testing.assert_allclose(y_BLD, expected, rtol=1e-5, atol=1e-5)
    assert np.all(np.asarray(y_BLD)[~cases.REAL] == 0)
    load = np.zeros((2, 2, HEADS, EXPERTS), int)  # row, side, head, expert
    for (row, _, head), sides in choices.items():
        for side, experts in enumerate(sides):
            np.add.at(load[row, side, head], experts, 1)
    np.testing.assert_array_equal(stats.router.load_UE, load.reshape(2, -1))
    assert int(stats.dispatch.kept) == 10 * 2 * HEADS * top_k
    assert int(unaccounted(stats, 2 * HEADS * top_k)) == 0


def test_gradients_are_the_slopes_of_the_loops():
    cases.assert_gradients(build(), reference(2))


def test_losses_are_means_over_heads_and_sides():
    layer = build()
    stats = cases.call(layer)[2]
    weights = cases.weights_of(layer)
    balances, squares = [], []
    for side in ("value", "out"):
        logits = (cases.X[cases.REAL] @ weights[f"{side}_weight_DE"]).reshape(-1, HEADS, EXPERTS)
        scores = oracle.sigmoid(logits)
        for head in range(HEADS):
            chosen = np.argsort(-scores[:, head], axis=-1)[:, :2]
            share = np.bincount(chosen.ravel(), minlength=EXPERTS) / chosen.size
            probability = (scores[:, head] / scores[:, head].sum(-1, keepdims=True)).mean(0)
            balances.append(EXPERTS * share @ probability)
            squares.append(np.mean(np.log(np.exp(logits[:, head]).sum(-1)) ** 2))
    router = jax.tree.map(lambda leaf: leaf.sum(0)[None, None], stats.router)
    np.testing.assert_allclose(load_balance(router, jnp.asarray(10)), [np.mean(balances)], rtol=1e-5)
    np.testing.assert_allclose(z_loss(router, jnp.asarray(10)), [np.mean(squares)], rtol=1e-5)
    np.testing.assert_allclose(router.importance_UE.sum(), 10, rtol=1e-5)


def test_heads_choose_each_for_itself():
    choices = reference(2)(cases.weights_of(build()), cases.X)[1]
    differ = [set(choices[b, i, 0][1]) != set(choices[b, i, 1][1]) for b, i, h in choices if h == 0]
    assert any(differ)


def test_dropout_needs_a_key():
    layer = build(dropout=0.5)
    once, again = (cases.call(layer, key=jax.random.key(seed))[0] for seed in (1, 2))
    assert not np.allclose(once, again)
    np.testing.assert_array_equal(cases.call(layer)[0], cases.call(build())[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SwitchHead(num_experts=2, top_k=3), r"top_k=3: must be at most num_experts=2"),
        (lambda: ModelConfig(num_kv_heads=2, attention=SwitchHead()), r"num_kv_heads=2.*leave it at None"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_survives_dictionaries_and_has_no_state():
    config = ModelConfig(attention=SwitchHead(num_experts=5))
    assert from_dict(ModelConfig, to_config_dict(config)) == config
    assert ATTENTIONS["switch_head"] is SwitchHead
    assert (SwitchHead().losses.load, SwitchHead().losses.z) == (0, 0)
    layer = build()
    assert layer.with_updated_router(cases.call(layer)[2]) is layer
