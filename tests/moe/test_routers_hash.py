"""Hash routing: fixed by the id, distinct, even over random ids, balanced by frequency, and without weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.config import ConfigError, from_dict, to_dict
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.layer import MoE
from sparse_lm.moe.routers import RouterShape
from sparse_lm.moe.routers.hash import Hash, balanced_table, bigrams, hashed_experts
from sparse_lm.moe.types import RouterInputs
from sparse_lm.sharding import DEFAULT


def route(config: Hash, ids, top_k: int = 1, num_experts: int = 4, seed: int = 0, mask=None, key=None):
    """Experts and gates of one group, and the scores."""
    router = config.build(jax.random.key(seed), RouterShape(4, num_experts, top_k), DEFAULT)
    ids_GS = jnp.asarray(ids, jnp.int32)[None]
    mask_GS = jnp.ones(ids_GS.shape, bool) if mask is None else jnp.asarray(mask)[None]
    x_GSD = jax.random.normal(jax.random.key(9), (1, len(ids), 4), jnp.bfloat16)
    decision, scores = router(RouterInputs(x_GSD, mask_GS, ids_GS, len(ids)), key)
    return np.asarray(decision.expert_GSK[0]), np.asarray(decision.gate_GSK[0]), scores


def test_the_mixing_by_hand():
    """Seed 0, two experts: 0 mixes to 0, so that expert e scores mix((e + 1) * 0x9E3779B9)."""

    def mixed(word):
        word = ((word ^ (word >> 16)) * 0x7FEB352D) % 2**32
        word = ((word ^ (word >> 15)) * 0x846CA68B) % 2**32
        return word ^ (word >> 16)

    assert mixed(0) == 0
    scores = [mixed(0x9E3779B9), mixed((2 * 0x9E3779B9) % 2**32)]
    got = hashed_experts(jnp.zeros((1, 1), jnp.int32), jnp.uint32(0), 2, 1)
    assert int(got[0, 0, 0]) == int(np.argmax(scores))


def test_equal_ids_get_equal_experts_whatever_the_token_and_the_key():
    ids = [5, 7, 5, 5, 7, 2**31 - 1]
    expert_SK, gate_SK, _ = route(Hash(), ids)
    assert expert_SK[0] == expert_SK[2] == expert_SK[3]
    assert expert_SK[1] == expert_SK[4]
    np.testing.assert_array_equal(route(Hash(), ids, key=jax.random.key(3))[0], expert_SK)
    assert gate_SK.dtype == np.float32
    assert np.all(gate_SK == 1)


@given(top_k=st.integers(1, 6), num_experts=st.integers(6, 9), first=st.integers(0, 2**30))
def test_the_experts_of_a_token_are_distinct(top_k, num_experts, first):
    ids_GS = first + jnp.arange(50, dtype=jnp.int32)[None]
    expert_SK = np.asarray(hashed_experts(ids_GS, jnp.uint32(77), num_experts, top_k))[0]
    assert all(len(set(experts)) == top_k for experts in expert_SK)
    assert expert_SK.min() >= 0
    assert expert_SK.max() < num_experts


def test_random_ids_are_spread_evenly_and_choices_are_independent():
    ids_GS = jnp.arange(16_000, dtype=jnp.int32)[None]
    expert_SK = np.asarray(hashed_experts(ids_GS, jnp.uint32(123), 8, 2))[0]
    for choice in range(2):
        counts = np.bincount(expert_SK[:, choice], minlength=8)
        assert np.sum((counts - 2000) ** 2 / 2000) < 24.3  # chi squared with 7 degrees of freedom, 0.999
    pairs = np.bincount(expert_SK[:, 0] * 8 + expert_SK[:, 1], minlength=64).reshape(8, 8)
    assert np.all(np.diag(pairs) == 0)
    expected = 16_000 / 56
    assert np.sum((pairs[~np.eye(8, dtype=bool)] - expected) ** 2 / expected) < 93.2  # 55 degrees of freedom


def test_another_seed_is_another_hash():
    ids = np.arange(200)
    same = np.mean(route(Hash(), ids, seed=0)[0] == route(Hash(), ids, seed=1)[0])
    assert 0.1 < same < 0.4  # one in four by chance
    np.testing.assert_array_equal(route(Hash(), ids, seed=1)[0], route(Hash(), ids, seed=1)[0])


def test_most_ids_keep_their_expert_when_an_expert_is_added():
    ids_GS = jnp.arange(1000, dtype=jnp.int32)[None]
    few, more = (np.asarray(hashed_experts(ids_GS, jnp.uint32(5), n, 1)).ravel() for n in (4, 5))
    assert np.all((more == few) | (more == 4))
    assert 0.15 < np.mean(more == 4) < 0.25


def test_balanced_by_hand():
    """By falling frequency: 3 (9) to expert 0, 0 (8) to 1, 4 (5) to 2, 2 (4) to 2 (5), 1 (3) to 1 (8), 5 (0) to 0."""
    table_VK = balanced_table((8.0, 3.0, 4.0, 9.0, 5.0, 0.0), 3, 1)
    np.testing.assert_array_equal(table_VK[:, 0], [1, 1, 2, 0, 2, 0])
    expert_SK, _, _ = route(Hash(mode="balanced", frequencies=(8.0, 3.0, 4.0, 9.0, 5.0, 0.0)), [3, 0, 5, 1], 1, 3)
    np.testing.assert_array_equal(expert_SK[:, 0], [0, 1, 0, 1])


def test_balanced_with_two_choices_by_hand():
    """2 (6) to 0 and 1; 0 (4) to 2 and 3; 1 (1) to the least loaded two: 2 and 3 with 4."""
    np.testing.assert_array_equal(balanced_table((4.0, 1.0, 6.0), 4, 2), [[2, 3], [2, 3], [0, 1]])


def test_ids_beyond_the_frequencies_are_hashed():
    ids = [0, 1, 2, 500]
    expert_SK, _, _ = route(Hash(mode="balanced", frequencies=(1.0, 1.0)), ids)
    hashed_SK, _, _ = route(Hash(), ids)
    np.testing.assert_array_equal(expert_SK[2:], hashed_SK[2:])
    np.testing.assert_array_equal(expert_SK[:2, 0], [0, 1])


def test_balanced_is_better_than_random_on_skewed_ids():
    frequencies = tuple(1.0 / (rank + 1) for rank in range(400))
    ids = np.arange(400)
    loads = []
    for config in (Hash(mode="balanced", frequencies=frequencies), Hash()):
        expert_S = route(config, ids, num_experts=4)[0][:, 0]
        load_E = np.bincount(expert_S, weights=frequencies, minlength=4)
        loads.append(load_E.max() / load_E.mean())
    assert loads[0] < 1.001 < loads[1]


def test_bigrams_by_hand():
    """No token before is the id itself; 0 before is the id plus mix(1); the pair, not the set, counts."""
    got = bigrams(jnp.array([[-1, 0, 3, 5]]), jnp.array([[7, 7, 5, 3]]))
    mixed = 1 * 0x7FEB352D % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 0x846CA68B % 2**32
    mixed ^= mixed >> 16
    np.testing.assert_array_equal(got[0, :2], [7, (7 + mixed) % 2**32])
    assert got[0, 2] != got[0, 3]


def test_all_pairs_of_a_vocabulary_have_words_of_their_own():
    pairs = np.mgrid[-1:300, 0:300].reshape(2, 1, -1)
    words = np.asarray(bigrams(jnp.asarray(pairs[0]), jnp.asarray(pairs[1])))
    assert len(np.unique(words)) > pairs.shape[-1] - 10  # 90 300 of 2^32: one collision is likely, ten are not


def route_pairs(config: Hash, previous, ids, num_experts: int = 8):
    router = config.build(jax.random.key(0), RouterShape(4, num_experts, 1), DEFAULT)
    ids_GS, mask_GS = jnp.asarray(ids, jnp.int32)[None], jnp.ones((1, len(ids)), bool)
    previous_GS = None if previous is None else jnp.asarray(previous, jnp.int32)[None]
    inputs = RouterInputs(jnp.zeros((1, len(ids), 4)), mask_GS, ids_GS, len(ids), previous_GS)
    return np.asarray(router(inputs, None)[0].expert_GSK)[0, :, 0]


def test_bigrams_go_by_the_token_before_and_alone_like_random():
    ids = np.full(4000, 17)
    experts = route_pairs(Hash(mode="bigram"), np.arange(4000), ids)
    counts = np.bincount(experts, minlength=8)
    assert np.sum((counts - 500) ** 2 / 500) < 24.3  # chi squared with 7 degrees of freedom, 0.999
    np.testing.assert_array_equal(route_pairs(Hash(mode="bigram"), np.arange(4000), ids), experts)
    alone = route_pairs(Hash(), np.arange(4000), ids)
    assert len(set(alone)) == 1
    np.testing.assert_array_equal(route_pairs(Hash(mode="bigram"), np.full(4000, -1), ids), alone)
    np.testing.assert_array_equal(route_pairs(Hash(mode="bigram"), None, ids), alone)


@pytest.mark.slow
def test_the_layer_groups_the_token_before_like_the_token():
    """Without drops, groups decide nothing: small ones, wide ones and those by position give the same outputs."""
    ids_BL = jax.random.randint(jax.random.key(1), (4, 6), 0, 9)
    previous_BL = jnp.concatenate([jnp.full((4, 1), -1), ids_BL[:, :-1]], axis=1)
    x_BLD, mask_BL = jax.random.normal(jax.random.key(2), (4, 6, 8)), jnp.ones((4, 6), bool)
    outputs = []
    options: dict[str, Any]
    for options in ({}, {"group_size": 3}, {"group_size": 12}, {"group_size": 2, "grouping": "position"}):
        config = MoEConfig(num_experts=8, router=Hash(mode="bigram"), capacity_factor_eval=None, **options)
        layer = MoE(jax.random.key(0), 8, 4, "relu", config, DEFAULT)
        outputs.append(np.asarray(layer(x_BLD, mask_BL, None, ids_BL, previous_BL)[0]))
        np.testing.assert_allclose(outputs[-1], outputs[0], rtol=1e-5, atol=1e-6)
    without = layer(x_BLD, mask_BL, None, ids_BL)[0]
    assert np.abs(np.asarray(without) - outputs[0]).max() > 1e-2
    np.testing.assert_array_equal(layer(x_BLD, mask_BL, None, ids_BL, jnp.full((4, 6), -1))[0], without)


def test_gates_padding_and_scores():
    mask = [True, False, True]
    expert_SK, gate_SK, scores = route(Hash(), [1, 1, 2], 2, mask=mask)
    np.testing.assert_array_equal(gate_SK, [[1, 1], [0, 0], [1, 1]])
    np.testing.assert_array_equal(expert_SK[1], [-1, -1])
    _, mean_SK, _ = route(Hash(gate="mean"), [1, 1, 2], 2, mask=mask)
    np.testing.assert_array_equal(mean_SK, gate_SK / 2)
    assert sorted(np.asarray(scores.probability_GSE[0, 0])) == [0, 0, 0.5, 0.5]
    assert np.all(np.asarray(scores.probability_GSE[0, 0])[expert_SK[0]] == 0.5)
    assert np.all(np.asarray(scores.logsumexp_GS) == 0)


def test_nothing_is_learned():
    router = Hash().build(jax.random.key(0), RouterShape(4, 4, 1), DEFAULT)
    assert not jax.tree.leaves(nnx.state(router, nnx.Param))
    assert len(jax.tree.leaves(router)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "balanced"}, r"config\.frequencies=\(\).*mode=balanced needs.*use mode=random"),
        ({"frequencies": (1.0,)}, r"config\.frequencies=\(1\.0,\).*no other mode reads them"),
        ({"mode": "balanced", "frequencies": (1.0, -2.0)}, r"config\.frequencies\[1\]=-2\.0.*at least 0"),
        ({"mode": "position"}, r"config\.mode='position'"),
    ],
)
def test_refusals(options: dict[str, Any], message):
    with pytest.raises(ConfigError, match=message):
        Hash(**options)


def test_the_configuration_survives_json():
    config = MoEConfig(router=Hash(mode="balanced", frequencies=(2.0, 1.0)))
    assert from_dict(MoEConfig, to_dict(config)) == config
