"""Experts removed and forced: the changed decisions by hand, and what a model makes of them."""

from __future__ import annotations

import dataclasses

import analysis_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.analysis.intervene import Effects, effects, forced, ratio, removed, without_drops
from sparse_lm.analysis.observe import observe
from sparse_lm.config import ConfigError
from sparse_lm.data.loader import validation_batches
from sparse_lm.evals.perplexity import make_evaluate
from sparse_lm.evals.routing import loss, record
from sparse_lm.moe.routers.expert_choice import ExpertChoice
from sparse_lm.moe.types import Replay

# Two layers, one group of three tokens, two choices.
DECISION = cases.choice(
    [[[[0, 1], [1, -1], [2, 0]]], [[[0, 1], [0, 2], [-1, -1]]]],
    [[[[0.6, 0.3], [0.8, 0.0], [0.5, 0.5]]], [[[0.7, 0.1], [0.4, 0.4], [0.0, 0.0]]]],
)
BATCHES = validation_batches(cases.DATASET, 8, 1)


def test_removed_by_hand():
    found = removed(DECISION, 0, 1, renormalise=False)
    np.testing.assert_array_equal(found.expert_GSK[0], [[[0, -1], [-1, -1], [2, 0]]])
    np.testing.assert_allclose(found.gate_GSK[0], [[[0.6, 0], [0, 0], [0.5, 0.5]]])
    np.testing.assert_array_equal(found.expert_GSK[1], DECISION.expert_GSK[1])
    np.testing.assert_array_equal(found.gate_GSK[1], DECISION.gate_GSK[1])


def test_removed_and_renormalised_by_hand():
    found = removed(DECISION, 0, 1, renormalise=True)
    # The first token's other gate takes all 0.9; the second has no other; the third had no such expert.
    np.testing.assert_allclose(found.gate_GSK[0], [[[0.9, 0], [0, 0], [0.5, 0.5]]], rtol=1e-6)
    np.testing.assert_array_equal(found.expert_GSK[0], [[[0, -1], [-1, -1], [2, 0]]])
    np.testing.assert_array_equal(found.gate_GSK[1], DECISION.gate_GSK[1])
    np.testing.assert_array_equal(found.gate_GSK[0, 0, 2], DECISION.gate_GSK[0, 0, 2])


def test_forced_by_hand():
    found = forced(DECISION, 1, 3)
    np.testing.assert_array_equal(found.expert_GSK[1], [[[3, -1], [3, -1], [-1, -1]]])
    np.testing.assert_allclose(found.gate_GSK[1], [[[0.8, 0], [0.8, 0], [0, 0]]], rtol=1e-6)
    np.testing.assert_array_equal(found.expert_GSK[0], DECISION.expert_GSK[0])
    np.testing.assert_array_equal(found.gate_GSK[0], DECISION.gate_GSK[0])
    assert found.expert_GSK.dtype == DECISION.expert_GSK.dtype


def test_what_else_a_decision_says_is_kept():
    decision = dataclasses.replace(DECISION, order_GS=jnp.zeros((2, 1, 3)), gate_on="input")
    for changed in (removed(decision, 0, 0, True), forced(decision, 0, 0)):
        assert changed.gate_on == "input" and changed.order_GS is decision.order_GS


def test_a_layer_that_is_not_there_changes_nothing():
    for changed in (removed(DECISION, -1, 0, True), removed(DECISION, -1, 0, False), forced(DECISION, -1, 0)):
        jax.tree.map(np.testing.assert_array_equal, changed, DECISION)


def test_ratio_and_its_error_by_hand():
    sums, targets = np.array([[2.0, 1.0], [6.0, 0.0], [1.0, 0.0]]), np.array([[2.0, 4.0], [3.0, 0.0], [1.0, 0.0]])
    mean, error = ratio(sums, targets)
    np.testing.assert_allclose(mean, [9 / 6, 0.25])
    residuals = np.array([2 - 3, 6 - 4.5, 1 - 1.5])
    np.testing.assert_allclose(error, [np.sqrt(np.sum(residuals**2) * 3 / 2) / 6, np.nan])
    # With as many targets in every row it is the standard error of a mean.
    values = np.array([1.0, 2.0, 4.0, 4.5])
    mean, error = ratio(5 * values[:, None], np.full((4, 1), 5.0))
    np.testing.assert_allclose([mean[0], error[0]], [values.mean(), values.std(ddof=1) / 2])
    assert np.isnan(ratio(np.zeros((2, 1)), np.zeros((2, 1)))[0]).all()


def test_a_model_without_drops_has_the_same_weights():
    model = cases.model()
    free = without_drops(model)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(free), jax.tree.leaves(model))
    assert observe(model, BATCHES).dropped_NP.any() and not observe(free, BATCHES).dropped_NP.any()
    made = cases.model(model__moe__capacity_factor_eval=None)
    batch = jax.tree.map(jnp.asarray, BATCHES[0])
    assert loss(free, batch) == loss(made, batch)


@pytest.mark.parametrize(
    "changes",
    [{"router": ExpertChoice(), "allow_non_causal": True}, {"num_zero": 2, "num_constant": 1, "free_share": 0.5}],
    ids=["expert_choice", "free"],
)
def test_nothing_is_dropped_whatever_the_router(changes):
    model = cases.model(**{f"model__moe__{key}": value for key, value in changes.items()})
    batch = jax.tree.map(jnp.asarray, BATCHES[0])
    decision = forced(record(model, batch), 0, 0)
    tokens, segments, positions = (x[:, :-1] for x in (batch.tokens_BL, batch.segments_BL, batch.positions_BL))
    reports = without_drops(model)(tokens, segments, positions, None, Replay(decision))[1]
    assert reports.feed_forward is not None
    dispatch = reports.feed_forward.dispatch
    assert not dispatch.dropped.any() and (dispatch.kept > 0).all()


def check(found: Effects, model, change):
    """Against the loss that replaying the changed decisions gives."""
    batch = jax.tree.map(jnp.asarray, BATCHES[0])
    decision = record(cases.model(), batch)
    before = loss(model, batch, decision)
    assert found.loss == pytest.approx(before, rel=1e-5)
    for layer in range(2):
        for expert in range(4):
            after = loss(model, batch, change(decision, layer, expert))
            assert found.change_NE[layer, expert] == pytest.approx(after - before, abs=2e-5), (layer, expert)
    weights = found.targets_C / found.targets_C.sum()
    np.testing.assert_allclose(found.change_NEC @ weights, found.change_NE, atol=1e-9)
    assert (found.error_NE > 0).all() and np.abs(found.change_NE).min() > 0


def test_removing_is_a_replay_without_the_expert():
    model = cases.model()
    for renormalise in (False, True):
        found = effects(model, BATCHES, 2, "remove", renormalise)
        check(found, model, lambda decision, n, e, how=renormalise: removed(decision, n, e, how))
    assert found.kind == "remove" and found.change_NEC.shape == (2, 4, 2)


def test_forcing_is_a_replay_with_the_expert_alone_and_no_drops():
    found = effects(cases.model(), BATCHES, 2, "force")
    check(found, without_drops(cases.model()), forced)
    # At the capacity of the run most of these tokens would be dropped.
    batch = jax.tree.map(jnp.asarray, BATCHES[0])
    decision = forced(record(cases.model(), batch), 0, 0)
    assert loss(cases.model(), batch, decision) != loss(without_drops(cases.model()), batch, decision)


def test_losses_by_domain_are_those_of_evaluation():
    found = effects(cases.model(), cases.BATCHES, 3, "remove")
    batches = [jax.tree.map(jnp.asarray, batch) for batch in cases.BATCHES]
    expected = make_evaluate(cases.DATASET.domains)(cases.model(), batches)
    np.testing.assert_allclose(found.loss_C[:2], list(expected.by_domain.values()), rtol=1e-5)
    assert found.targets_C.sum() == expected.targets and found.loss == pytest.approx(expected.loss, rel=1e-5)
    # A domain of which the rows have nothing.
    assert found.targets_C[2] == 0 and np.isnan(found.loss_C[2]) and np.isnan(found.change_NEC[..., 2]).all()


def test_an_expert_that_no_token_has_costs_nothing():
    """With a zero expert in the router's table: taking it away changes what nobody computed, exactly nothing."""
    found = effects(cases.model(model__moe__num_zero=1), BATCHES, 2, "remove")
    assert found.change_NE.shape == (2, 5)
    np.testing.assert_array_equal(found.change_NE[:, 4], 0.0)
    assert (found.change_NE[:, :4] != 0).all()


def test_progress_is_told_and_dense_models_are_refused():
    lines: list[str] = []
    effects(cases.model(), BATCHES, 2, "remove", progress=lines.append)
    assert [line.split(",")[0] for line in lines] == ["remove experts: 1 of 2 layers", "remove experts: 2 of 2 layers"]
    with pytest.raises(ConfigError, match="dense"):
        effects(cases.model(model__moe=None), BATCHES, 2, "force")
