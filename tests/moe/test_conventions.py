"""Each row of the table of conventions, against the family's own formula written out."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.config import ConfigError
from sparse_lm.moe.balance import load_balance
from sparse_lm.moe.conventions import FAMILIES, convert_capacity, convert_coefficient
from sparse_lm.moe.slots import capacity
from sparse_lm.moe.types import RouterStats

EXPERTS, TOKENS, LAYERS = 4, 64, 3


def routing(top_k, seed=0):
    """Probabilities [N, T, E] and one-hot choices [N, T, k, E] of a few layers."""
    logits = np.random.default_rng(seed).normal(size=(LAYERS, TOKENS, EXPERTS))
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-probability, axis=-1)[..., :top_k]
    return probability, np.eye(EXPERTS)[chosen]


def ours(probability, one_hot) -> np.ndarray:
    """Our loss per layer."""
    load = jnp.asarray(one_hot.sum(axis=(1, 2))[:, None], jnp.int32)
    importance = jnp.asarray(probability.sum(axis=1)[:, None], jnp.float32)
    zero = jnp.zeros((LAYERS, 1), jnp.float32)
    stats = RouterStats(zero + TOKENS, zero, zero, load, importance, zero, zero, zero)
    return np.asarray(load_balance(stats, jnp.asarray(float(TOKENS))), np.float64)


def per_layer_sum(per_layer):
    return lambda probability, one_hot: sum(per_layer(p, h) for p, h in zip(probability, one_hot, strict=True))


# Each formula is the family's total load-balance loss over the layers, before its coefficient.
FORMULAS = {
    "sparse_lm": lambda probability, one_hot: ours(probability, one_hot).sum(),
    # mean over tokens of the one-hot choices keeps the axis k, which the product then sums over
    "hf_mixtral": lambda probability, one_hot: (
        EXPERTS
        * (
            one_hot.reshape(-1, one_hot.shape[2], EXPERTS).mean(0) * probability.reshape(-1, EXPERTS).mean(0)[None]
        ).sum()
    ),
    "maxtext": per_layer_sum(lambda p, h: (h.sum(1).mean(0) * p.mean(0)).sum() * EXPERTS),
    "flaxformer": lambda probability, one_hot: np.mean(
        [(h.max(1).mean(0) * p.mean(0)).mean() * EXPERTS**2 for p, h in zip(probability, one_hot, strict=True)]
    ),
    "mesh_tf": per_layer_sum(lambda p, h: (h[:, 0].mean(0) * p.mean(0)).mean() * EXPERTS**2),
    "megatron": per_layer_sum(lambda p, h: (p.sum(0) * h.sum((0, 1))).sum() * EXPERTS / (TOKENS**2 * h.shape[1])),
    "megablocks": lambda probability, one_hot: (
        sum(
            EXPERTS / (TOKENS * h.shape[1]) * h.sum((0, 1)) @ p.mean(0)
            for p, h in zip(probability, one_hot, strict=True)
        )
        / LAYERS
    ),
    "deepseek": per_layer_sum(lambda p, h: ((EXPERTS / (h.shape[1] * TOKENS)) * h.sum((0, 1)) * p.mean(0)).sum()),
    "levanter": per_layer_sum(lambda p, h: (h.sum(1).mean(0) / h.shape[1] ** 2 * p.mean(0)).sum() * EXPERTS),
    "moe_plus_plus": per_layer_sum(lambda p, h: (h.sum(1).mean(0) * p.mean(0)).sum()),
}


def balanced(top_k):
    """Perfectly balanced choices in every layer, choice by choice, with uniform probabilities."""
    chosen = (np.arange(TOKENS)[:, None] + np.arange(top_k)) % EXPERTS
    return np.full((LAYERS, TOKENS, EXPERTS), 1 / EXPERTS), np.broadcast_to(
        np.eye(EXPERTS)[chosen], (LAYERS, TOKENS, top_k, EXPERTS)
    )


def weighed(name, top_k, probability, one_hot):
    """Our weighted loss with a converted coefficient, beside the family's with its own."""
    coefficient = convert_coefficient(0.02, name, top_k=top_k, num_experts=EXPERTS, sparse_layers=LAYERS)
    return coefficient * ours(probability, one_hot).sum(), 0.02 * FORMULAS[name](probability, one_hot)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_converted_coefficient_weighs_the_same(name, top_k):
    family = FAMILIES[name]
    exact = family.layers != "pooled" and (not family.first_choice or top_k == 1)
    here, there = weighed(name, top_k, *(routing(top_k) if exact else balanced(top_k)))
    assert here == pytest.approx(there, rel=1e-5)


def test_every_family_with_a_loss_in_the_table_is_written_out():
    assert FORMULAS.keys() | {"gshard_paper"} == FAMILIES.keys()


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_literal_loss_of_the_gshard_paper(top_k):
    # Algorithm 1: (1/E) * sum_e (c_e / S) * m_e, over first choices; 1 / E^2 at perfect balance.
    probability, one_hot = balanced(top_k)
    there = sum((h[:, 0].mean(0) * p.mean(0)).sum() / EXPERTS for p, h in zip(probability, one_hot, strict=True))
    assert there == pytest.approx(LAYERS / EXPERTS**2)
    coefficient = convert_coefficient(0.02, "gshard_paper", top_k=top_k, num_experts=EXPERTS, sparse_layers=LAYERS)
    assert coefficient * ours(probability, one_hot).sum() == pytest.approx(0.02 * there, rel=1e-5)


def test_pooled_layers_are_only_equal_when_balanced_alike():
    here, there = weighed("hf_mixtral", 2, *routing(2))
    assert here != pytest.approx(there, rel=1e-4)


def test_capacity_at_the_published_sizes():
    # 100 tokens, 8 experts, k = 2, factor 1.25: 32 slots where k counts, 16 where it does not.
    assert capacity(convert_capacity(1.25, "megatron", top_k=2), 2, 100, 8) == 32
    assert capacity(convert_capacity(1.25, "flaxformer", top_k=2), 2, 100, 8) == 16
    assert capacity(convert_capacity(1.25, "mesh_tf", top_k=1), 1, 100, 8) == 16


def test_what_cannot_be_converted():
    with pytest.raises(ConfigError, match=r"source='megatrn'.*did you mean 'megatron'"):
        convert_coefficient(0.01, "megatrn", top_k=1, num_experts=4, sparse_layers=1)
    with pytest.raises(ConfigError, match="routes without a capacity"):
        convert_capacity(1.25, "hf_mixtral", top_k=2)
    with pytest.raises(ConfigError, match=r"sparse_layers=0"):
        convert_coefficient(0.01, "megatron", top_k=1, num_experts=4, sparse_layers=0)
