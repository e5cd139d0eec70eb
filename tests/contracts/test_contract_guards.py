"""What the configuration refuses would go wrong: each guard lifted, and what happens then."""

from __future__ import annotations

import cases
import harness
import numpy as np
import pytest
from test_contract_flow import earlier_changes

from sparse_lm.config import ConfigError
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers.expert_choice import ExpertChoice
from sparse_lm.moe.routers.prototype import Prototype
from sparse_lm.moe.routers.soft import SoftMixture


@pytest.mark.parametrize("dispatcher", ["dense", "gather", "all_to_all"])
def test_a_dispatcher_that_cannot_carry_a_mixture(dispatcher, monkeypatch):
    case = cases.ROUTER_CASES["soft"]
    with pytest.raises(ConfigError, match=f"dispatcher.*{dispatcher}.*einsum"):
        cases.dispatched(case, dispatcher)
    monkeypatch.setattr(SoftMixture, "dispatchers", None)
    with pytest.raises(AttributeError, match="expert_GSK"):  # in the middle of tracing, and not a word of why
        harness.run(cases.Case(case.moe.replace(dispatcher=dispatcher)))


def test_another_capacity_in_evaluation_where_slots_have_weights(monkeypatch):
    options = {"group_size": 8, "dispatcher": "einsum", "capacity_factor_eval": 2.0}
    with pytest.raises(ConfigError, match="capacity_factor_eval"):
        cases.moe(2, SoftMixture(), **options)
    monkeypatch.setattr(MoEConfig, "_check_carried", lambda self: None)
    one, other = (
        harness.run(
            cases.Case(cases.moe(2, SoftMixture(), **{**options, "capacity_factor_eval": factor}), training=False)
        )
        for factor in (1.0, 2.0)
    )
    np.testing.assert_array_equal(one.y_BLD, other.y_BLD)  # the option says something and does nothing


def test_experts_that_choose_without_a_capacity(monkeypatch):
    with pytest.raises(ConfigError, match=r"capacity_factor.*all tokens"):
        cases.moe(2, ExpertChoice(), capacity_factor=None)
    monkeypatch.setattr(MoEConfig, "_check_carried", lambda self: None)
    stats = harness.run(cases.Case(cases.moe(2, ExpertChoice(), capacity_factor=None))).stats
    # Eight experts per token where two were asked for, at four times the cost.
    np.testing.assert_array_equal(stats.router.load_UE.sum(0), [stats.router.tokens_U.sum()] * 8)


def test_first_choices_first_among_prototypes_is_causal_and_not_refused():
    # A prototype's experts serve one choice only, so no first choice can take a second choice's slot.
    moe = cases.moe(2, Prototype(cases.ROUTER_SCALE), priority="first_choice", capacity_factor=0.5)
    assert moe.causal
    assert earlier_changes(moe, training=True) == 0
    assert not moe.replace(priority="probability").causal
