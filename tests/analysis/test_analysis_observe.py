"""What is observed: tokens without padding, experts where their tokens stand, drops by place."""

from __future__ import annotations

import analysis_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.analysis.observe import (
    batch_rows,
    by_row,
    check_sparse,
    chosen_experts,
    drop_shares,
    loads,
    observe,
    tokens_of,
)
from sparse_lm.config import ConfigError
from sparse_lm.data.loader import validation_batches
from sparse_lm.evals.routing import record
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.attention.mixture import Mixture
from sparse_lm.moe.config import BalanceConfig, MoEConfig
from sparse_lm.moe.routers.hash import Hash
from sparse_lm.moe.routers.soft import SoftMixture


def test_tokens_by_hand():
    one = cases.batch([[1, 2, 3, 4], [5, 6, 0, 0]], [[1, 1, 2, 2], [1, 1, 0, 0]], [[0, 1, 0, 1], [0, 1, 0, 0]])
    other = cases.batch([[7, 8, 9, 9]], [[3, 3, 3, 3]], [[4, 5, 6, 7]], [[1, 1, 1, 1]])
    found = tokens_of([one, other])
    # The last token of a row is predicted and never read.
    np.testing.assert_array_equal(found.id_M, [1, 2, 3, 5, 6, 7, 8, 9])
    np.testing.assert_array_equal(found.position_M, [0, 1, 0, 0, 1, 4, 5, 6])
    np.testing.assert_array_equal(found.domain_M, [0, 0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(found.part_M, [0, 0, 1, 2, 2, 3, 3, 3])


def test_groups_are_put_back_where_their_tokens_stand():
    rows, length = 4, 6
    place = np.arange(rows * length).reshape(1, rows, length, 1)
    for moe, grouped in (
        (MoEConfig(), place),
        (MoEConfig(group_size=3), place.reshape(1, 8, 3, 1)),
        (MoEConfig(group_size=12), place.reshape(1, 2, 12, 1)),
        (
            MoEConfig(group_size=2, grouping="position"),
            np.concatenate([place[:, :2].swapaxes(1, 2), place[:, 2:].swapaxes(1, 2)], axis=1),
        ),
    ):
        np.testing.assert_array_equal(by_row(grouped, moe, (rows, length)), place)


def test_grouping_by_position_is_undone_as_the_layer_does_it():
    """A hash of the token's id says for every place which expert it must have."""
    moe = {"model__moe__router": Hash(), "model__moe__top_k": 1, "model__moe__group_size": 4}
    found = [
        observe(cases.model(**moe, model__moe__grouping=grouping), cases.BATCHES)
        for grouping in ("sequence", "position")
    ]
    np.testing.assert_array_equal(found[0].expert_NMK, found[1].expert_NMK)
    ids, experts = found[1].tokens.id_M, found[1].expert_NMK[0, :, 0]
    assert all(len(set(experts[ids == token])) == 1 for token in set(ids))


def test_observed_is_what_was_recorded():
    model = cases.model()
    found = observe(model, cases.BATCHES)
    device = [jax.tree.map(jnp.asarray, batch) for batch in cases.BATCHES]
    experts, gates = [], []
    for batch in device:
        decision, real = record(model, batch), np.asarray(batch.segments_BL[:, :-1]) > 0
        experts.append(np.asarray(decision.expert_GSK)[:, real])
        gates.append(np.asarray(decision.gate_GSK)[:, real])
    np.testing.assert_array_equal(found.expert_NMK, np.concatenate(experts, axis=1))
    np.testing.assert_array_equal(found.gate_NMK, np.concatenate(gates, axis=1))
    assert found.expert_NMK.shape == (2, len(found.tokens.id_M), 2) and found.num_experts == 4
    assert found.expert_NMK.min() >= 0, "a real token without an expert"
    # Every assignment is at some place, and this capacity drops some but not all.
    np.testing.assert_array_equal(found.routed_NP.sum(1), loads(found.expert_NMK, 4).sum(1))
    assert (found.dropped_NP.sum(1) > 0).all() and (found.dropped_NP <= found.routed_NP).all()
    kept = observe(cases.model(model__moe__capacity_factor_eval=None), cases.BATCHES)
    assert not kept.dropped_NP.any() and (kept.expert_NMK[0] == found.expert_NMK[0]).all()


def test_free_experts_count_among_the_experts():
    found = observe(cases.model(model__moe__num_zero=1, model__moe__num_copy=1), cases.BATCHES)
    assert found.num_experts == 6 and loads(found.expert_NMK, 6).shape == (2, 6)


def test_drops_by_position_by_hand():
    routed, dropped = np.array([[4, 2, 0], [8, 1, 5]]), np.array([[1, 2, 0], [0, 1, 1]])
    np.testing.assert_allclose(drop_shares(routed, dropped), [[0.25, 1, 0], [0, 1, 0.2]])


def test_loads_by_hand():
    expert = np.array([[[0, 2], [2, -1]], [[1, 1], [-1, -1]]])
    np.testing.assert_array_equal(loads(expert, 3), [[1, 0, 2], [0, 2, 0]])


def test_rows_that_have_to_stay_together_do():
    assert batch_rows(MoEConfig(), 16) == batch_rows(None, 16) == 8
    assert batch_rows(MoEConfig(group_size=48), 16) == 9
    assert batch_rows(MoEConfig(group_size=20, grouping="position"), 16) == 20


def test_models_without_choices_are_refused():
    with pytest.raises(ConfigError, match=r"model\.moe=None.*dense"):
        check_sparse(cases.config(model__moe=None).model)
    balance = BalanceConfig(load=0.0, z=0.0)
    soft = MoEConfig(
        router=SoftMixture(),
        dispatcher="einsum",
        balance=balance,
        group_size=8,
        capacity_factor_eval=1.25,
        allow_non_causal=True,
    )
    with pytest.raises(ConfigError, match=r"router\.kind='soft'.*chooses none"):
        check_sparse(ModelConfig(moe=soft))
    assert check_sparse(cases.config().model).num_experts == 4
    attention = Mixture(num_experts=4, top_k=2)
    for moe in (None, soft):
        with pytest.raises(ConfigError):
            chosen_experts(ModelConfig(moe=moe))
        assert chosen_experts(ModelConfig(moe=moe, num_heads=4, num_kv_heads=2, attention=attention)) is None
    assert chosen_experts(cases.config().model) == cases.config().model.moe


def test_batches_come_from_the_dataset_of_the_cases():
    assert len(cases.BATCHES) == len(validation_batches(cases.DATASET, 8, 2)) >= 1
    assert {0, 1} <= set(tokens_of(cases.BATCHES).domain_M)
