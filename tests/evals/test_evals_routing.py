"""Recorded decisions: replayed to the same loss, stored, refused elsewhere; saturation and co-activation by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparse_lm.data.loader import build_dataset, validation_batches
from sparse_lm.evals.routing import coactivation, load, loss, pair_counts, record, saturation, save
from sparse_lm.experiment import resolved
from sparse_lm.models.config import DepthConfig
from sparse_lm.models.decoder import build_decoder
from sparse_lm.moe.types import TokenChoice
from sparse_lm.sharding import DEFAULT

CONFIG = tiny.experiment(model__moe__top_k=2, model__moe__every=1, model__moe__capacity_factor=0.7)
DATASET = build_dataset(CONFIG.data, CONFIG.seed)
HOST = validation_batches(DATASET, 8, 8)[0]
BATCH = jax.tree.map(jnp.asarray, HOST)
KEY = jax.random.key(3)


def build(seed=0, **changes):
    return build_decoder(jax.random.key(seed), resolved(CONFIG.replace(**changes), DATASET.vocab_size).model, DEFAULT)


MODEL = build()


def decisions(expert) -> TokenChoice:
    expert = jnp.asarray(expert, jnp.int32)
    return TokenChoice(expert, jnp.where(expert >= 0, 0.5, 0.0))


@pytest.mark.parametrize("key", [None, KEY], ids=["evaluation", "training"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__scan_layers": False},
        {"model__remat": "full"},
        {"model__moe__every": 2, "model__num_layers": 3},
        {"model__moe__priority": "random", "model__moe__allow_non_causal": True},
    ],
    ids=["scan", "loop", "remat", "every", "random"],
)
def test_replay_reproduces_the_loss_exactly(changes, key):
    model = build(**changes)
    found = record(model, BATCH, key)
    rows, length = HOST.tokens_BL.shape[0], HOST.tokens_BL.shape[1] - 1
    assert found.expert_GSK.shape == (sum(model.config.sparse), rows, length, 2)
    own = loss(model, BATCH, key=key)
    assert loss(model, BATCH, found, key) == own
    if found.order_GS is not None:  # without the recorded order, other assignments are dropped
        assert loss(model, BATCH, dataclasses.replace(found, order_GS=None), key) != own


def test_each_layer_gets_its_own_decisions():
    found = record(MODEL, BATCH)
    swapped = jax.tree.map(lambda leaf: leaf[::-1], found)
    assert loss(MODEL, BATCH, swapped) != loss(MODEL, BATCH)
    for layer in range(2):
        other = dataclasses.replace(found, gate_GSK=found.gate_GSK.at[layer].multiply(0.5))
        assert loss(MODEL, BATCH, other) != loss(MODEL, BATCH), layer


def test_another_model_routes_as_it_is_told(mesh_of):
    found = record(MODEL, BATCH)
    other = build(seed=1)
    assert loss(other, BATCH, found) != loss(other, BATCH)
    again = record(other, BATCH)
    assert np.mean(np.asarray(again.expert_GSK) == np.asarray(found.expert_GSK)) < 0.9
    with jax.set_mesh(mesh_of(data=2, expert=4)):
        model = build()
        batch = jax.tree.map(lambda leaf: DEFAULT.constrain(leaf, "B."), BATCH)
        elsewhere = record(model, batch)
        np.testing.assert_array_equal(elsewhere.expert_GSK, found.expert_GSK)
        np.testing.assert_allclose(loss(model, batch, found), loss(MODEL, BATCH), rtol=1e-6)


def test_a_stored_decision_comes_back_whole(tmp_path):
    found = record(build(model__moe__priority="random", model__moe__allow_non_causal=True), BATCH, KEY)
    save(tmp_path / "decisions.npz", found)
    stored = load(tmp_path / "decisions.npz")
    assert stored.gate_on == found.gate_on == "output"
    for one, other in zip(jax.tree.leaves(stored), jax.tree.leaves(found), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    with pytest.raises(ValueError, match=r"other\.npz.*weights.*save"):
        load(tmp_path / "other.npz")


def test_decisions_that_do_not_fit_are_refused():
    found = record(MODEL, BATCH)
    with pytest.raises(ValueError, match="1 layers and the model has 2"):
        loss(MODEL, BATCH, jax.tree.map(lambda leaf: leaf[:1], found))
    with pytest.raises(ValueError, match=r"groups.*group_size"):
        loss(MODEL, jax.tree.map(lambda leaf: leaf[:4], BATCH), found)
    with pytest.raises(ValueError, match="dense"):
        record(build(model__moe=None), BATCH)
    depth = DepthConfig(allow_non_causal=True)
    with pytest.raises(ValueError, match="depth"):
        record(build(model__depth=depth), BATCH, KEY)


def test_saturation_by_hand():
    later = decisions([[[[0, 1], [2, 3], [1, -1], [-1, -1]]]])
    earlier = decisions([[[[1, 0], [3, 0], [2, 1], [0, 1]]]])
    np.testing.assert_allclose(saturation(earlier, later), [(1 + 0.5 + 1) / 3])
    np.testing.assert_allclose(saturation(later, later), [1.0])
    with pytest.raises(ValueError, match="not comparable"):
        saturation(decisions([[[[0, 1]]]]), later)


def test_saturation_of_unrelated_routers_is_k_over_e():
    rng = np.random.default_rng(0)
    one, other = (decisions(np.argsort(rng.random((2, 4, 5000, 8)), -1)[..., :2]) for _ in range(2))
    np.testing.assert_allclose(saturation(one, other), [2 / 8] * 2, atol=0.01)


def test_coactivation_by_hand():
    found = decisions([[[[0, 1], [0, 2], [0, -1], [-1, -1]]], [[[3, 2], [3, 2], [2, 3], [0, 1]]]])
    np.testing.assert_array_equal(
        pair_counts(found.expert_GSK, 4)[0], [[3, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    )
    shares = coactivation(found, 4)
    np.testing.assert_allclose(shares[0], [[1, 1 / 3, 1 / 3, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(shares[1, 2:, 2:], 1)
