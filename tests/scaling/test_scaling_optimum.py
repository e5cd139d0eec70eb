"""Optima: the closed form, the tables of the papers, and curves of equal FLOPs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.config import ConfigError
from sparse_lm.scaling.laws import Chinchilla
from sparse_lm.scaling.optimum import best_granularity, closed_form, costly, iso_flop, needed, optimum
from sparse_lm.scaling.published import CHINCHILLA, GRANULARITY, JOINT, SPARSITY, UNIFIED_S_BASE

# Ludziejewski et al. 2025, table 1: budget, experts, active parameters, tokens.
JOINT_OPTIMA = [
    (1e20, 1, 1.7e9, 9.7e9),
    (1e20, 2, 1.5e9, 11.4e9),
    (1e20, 4, 1.2e9, 13.9e9),
    (1e20, 8, 990e6, 17e9),
    (1e20, 16, 810e6, 20.7e9),
    (1e20, 32, 669e6, 24.9e9),
    (1e21, 1, 5.7e9, 29.3e9),
    (1e21, 2, 5e9, 33e9),
    (1e21, 4, 4.4e9, 38e9),
    (1e21, 8, 3.8e9, 44.3e9),
    (1e21, 16, 3.3e9, 51.2e9),
    (1e21, 32, 2.85e9, 58.4e9),
    (1e22, 1, 18.8e9, 88.6e9),
    (1e22, 2, 17.4e9, 96e9),
    (1e22, 4, 15.8e9, 105.4e9),
    (1e22, 8, 14.4e9, 115.8e9),
    (1e22, 16, 13.2e9, 126.5e9),
    (1e22, 32, 12.2e9, 136.9e9),
]
# Krajewski et al. 2024, table 2: active parameters (of 64 times as many), tokens, granularity, FLOPs.
GRANULARITY_OPTIMA = [
    (100e6, 4.37e9, 8, 2.95e18),
    (1e9, 28.94e9, 16, 1.93e20),
    (3e9, 72.90e9, 16, 1.41e21),
    (7e9, 137.60e9, 32, 6.46e21),
    (70e9, 941.07e9, 32, 4.16e23),
    (300e9, 2.96e12, 64, 5.69e24),
    (1e12, 7.94e12, 64, 4.97e25),
]


def test_closed_form_by_hand():
    """alpha = beta and a = b: as many parameters as tokens, sqrt(F / 6) of both."""
    found = closed_form(Chinchilla(e=1.0, a=10.0, b=10.0, alpha=0.5, beta=0.5), 6e12)
    assert (found.size, found.tokens) == (pytest.approx(1e6), pytest.approx(1e6))
    assert found.loss == pytest.approx(1 + 10 / 1e3 + 10 / 1e3)


@given(
    st.floats(1, 3),
    st.floats(10, 1e3),
    st.floats(10, 1e3),
    st.floats(0.15, 0.6),
    st.floats(0.15, 0.6),
    st.floats(17, 23),
)
def test_the_search_finds_the_closed_form(e, a, b, alpha, beta, digits):
    law = Chinchilla(e=e, a=a, b=b, alpha=alpha, beta=beta)
    exact = closed_form(law, 10**digits)
    found = optimum(law, 10**digits)
    assert 6 * exact.size * exact.tokens == pytest.approx(10**digits)
    assert found.size == pytest.approx(exact.size, rel=1e-3)
    assert found.loss == pytest.approx(exact.loss, rel=1e-9)


@pytest.mark.parametrize(("flops", "experts", "active", "tokens"), JOINT_OPTIMA)
def test_optima_that_ludziejewski_et_al_state(flops, experts, active, tokens):
    found = optimum(JOINT, flops, experts=experts)
    assert (found.size, found.tokens) == (pytest.approx(active, rel=0.025), pytest.approx(tokens, rel=0.025))
    assert found.size == pytest.approx(closed_form(JOINT.at(experts), flops).size, rel=1e-4)
    assert found.fixed == {"experts": experts} and found.flops == flops


@pytest.mark.parametrize(("active", "tokens", "granularity", "flops"), GRANULARITY_OPTIMA)
def test_optima_that_krajewski_et_al_state(active, tokens, granularity, flops):
    found = best_granularity(GRANULARITY, flops)
    assert found.fixed["granularity"] == granularity
    assert found.size == pytest.approx(active / 12 * 516, rel=0.03)
    assert found.tokens == pytest.approx(tokens, rel=0.03)


def test_more_experts_are_better_at_every_budget_and_want_more_tokens():
    """Findings 1 and 2 of Ludziejewski et al."""
    for flops in (1e19, 1e21, 1e23):
        found = [optimum(JOINT, flops, experts=experts) for experts in (1, 2, 4, 8, 16, 32)]
        assert np.all(np.diff([one.loss for one in found]) < 0)
        assert np.all(np.diff([one.tokens / one.size for one in found]) > 0)


def test_sparser_models_are_larger_and_use_fewer_parameters_per_token():
    """What Abnar et al. report along curves of equal FLOPs."""
    found = [optimum(SPARSITY, 1e20, sparsity=sparsity) for sparsity in (0.0, 0.5, 0.75, 0.9, 0.95)]
    active = [one.size * (1 - one.fixed["sparsity"]) for one in found]
    assert np.all(np.diff([one.size for one in found]) > 0) and np.all(np.diff(active) < 0)
    assert np.all(np.diff([one.loss for one in found]) < 0)


def test_a_curve_spends_its_budget_at_every_size():
    curve = iso_flop(JOINT, 1e21, np.geomspace(1e8, 1e11, 9), {"experts": 4.0})
    assert 6 * curve.size * curve.tokens == pytest.approx(np.full(9, 1e21))
    assert curve.loss == pytest.approx(JOINT.loss(active=curve.size, tokens=curve.tokens, experts=np.full(9, 4.0)))
    assert 0 < np.argmin(curve.loss) < 8


def test_routing_costs_tokens():
    few = iso_flop(GRANULARITY, 1e20, [1e9], {"granularity": 1.0})
    many = iso_flop(GRANULARITY, 1e20, [1e9], {"granularity": 64.0})
    fewer_experts = iso_flop(GRANULARITY, 1e20, [1e9], {"granularity": 64.0, "experts": 16.0})
    assert many.tokens < few.tokens and fewer_experts.tokens != many.tokens
    assert needed(GRANULARITY) == ("granularity",) and costly(GRANULARITY) == ("granularity", "experts")


def test_refusals_name_what_is_wrong():
    with pytest.raises(ConfigError, match=r"config\.experts=None: is needed: the law joint depends on it"):
        optimum(JOINT, 1e20)
    with pytest.raises(ConfigError, match=r"sparsity=0\.5: the law chinchilla does not depend on it"):
        optimum(CHINCHILLA, 1e20, sparsity=0.5)
    with pytest.raises(ConfigError, match=r"experts=0\.5: must be at least 1"):
        optimum(JOINT, 1e20, experts=0.5)
    with pytest.raises(ConfigError, match=r"sparsity=1\.0: must be at least 0 and below 1"):
        optimum(SPARSITY, 1e20, sparsity=1.0)
    with pytest.raises(ConfigError, match=r"flops=-1\.0: must be greater than 0"):
        optimum(CHINCHILLA, -1.0)
    with pytest.raises(ConfigError, match="has no term in tokens"):
        optimum(UNIFIED_S_BASE, 1e20, experts=8.0)


def test_a_law_without_an_optimum_says_so():
    useless_tokens = Chinchilla(e=1.0, a=100.0, b=1e-300, alpha=0.5, beta=0.5)
    with pytest.raises(ConfigError, match="no optimum"):
        optimum(useless_tokens, 1e20)
