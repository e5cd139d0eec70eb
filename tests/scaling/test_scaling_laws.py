"""Laws: values computed by hand, what the papers state about them, and columns that are missing or not theirs."""

from __future__ import annotations

import dataclasses
import math
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scaling_cases import GRIDS

from sparse_lm.config import ConfigError
from sparse_lm.scaling.laws import LIMITS, Chinchilla, Unified, saturated
from sparse_lm.scaling.published import CHINCHILLA, GRANULARITY, JOINT, LAWS, PUBLISHED, SPARSITY, UNIFIED_S_BASE


def test_chinchilla_by_hand():
    law = Chinchilla(e=1.0, a=8.0, b=27.0, alpha=0.5, beta=1 / 3)
    assert law.loss(active=16.0, tokens=1000.0) == pytest.approx(1 + 8 / 4 + 27 / 10)


def test_unified_by_hand():
    law = Unified(a=-0.1, b=-0.2, c=0.01, d=1.0, e_start=1.0, e_max=1e12)
    # With such ends E' is E, up to 1e-12.
    assert law.loss(active=1e8, experts=100.0) == pytest.approx(10 ** (-0.8 - 0.4 + 0.16 + 1))


def test_granularity_by_hand():
    law = dataclasses.replace(GRANULARITY, c=0.5, g=3.0, a=2.0, b=9.0, alpha=0.5, beta=0.5, gamma=1.0)
    found = law.loss(total_non_embedding=100.0, tokens=81.0, granularity=3.0)
    assert found == pytest.approx(0.5 + (1 + 2) / 10 + 1)


def test_sparsity_by_hand():
    law = dataclasses.replace(SPARSITY, a=1, b=2, c=3, d=4, e=5, alpha=1, beta=1, lam=-1, delta=1, gamma=1)
    assert law.loss(total=10.0, tokens=20.0, sparsity=0.5) == pytest.approx(0.1 + 0.1 + 1.5 + 0.8 + 5)


def test_joint_is_chinchilla_for_each_number_of_experts():
    """Table 4 of the paper, within the rounding of its table 3."""
    stated = {
        1: (30.3640, 0.1817, 53.9838, 0.1965),
        2: (27.7982, 0.1780, 66.8401, 0.2065),
        4: (24.8462, 0.1731, 87.7022, 0.2192),
        8: (21.8330, 0.1676, 119.9126, 0.2338),
        16: (19.0159, 0.1617, 167.5073, 0.2494),
        32: (16.5424, 0.1557, 234.6726, 0.2652),
    }
    for experts, (m, mu, n, nu) in stated.items():
        law = JOINT.at(experts)
        assert (law.a, law.b) == (pytest.approx(m, rel=3e-3), pytest.approx(n, rel=3e-3))
        assert (law.alpha, law.beta) == (pytest.approx(mu, abs=2e-4), pytest.approx(nu, abs=2e-4))
        here = JOINT.loss(active=3e8, tokens=7e9, experts=experts)
        assert here == pytest.approx(law.loss(active=3e8, tokens=7e9), rel=1e-12)


@given(st.floats(1, 1e4), st.floats(1.1, 5), st.floats(30, 500))
def test_experts_saturate(experts, start, most):
    worth = saturated(experts, start, most)
    assert saturated(1.0, start, most) == pytest.approx(start)
    assert start * (1 - 1e-12) <= worth < most
    assert saturated(experts + 1, start, most) > worth
    assert saturated(1e9, start, most) == pytest.approx(most, rel=1e-3)


def test_what_clark_et_al_state():
    """Their N = 5M with 128 experts is worth 55M dense parameters, and 937B are the end of routing's gains."""
    assert UNIFIED_S_BASE.effective_parameters(5e6, 128) == pytest.approx(55e6, rel=0.1)
    assert UNIFIED_S_BASE.effective_parameters(5e6, 1) == pytest.approx(5e6, rel=1e-9)
    assert UNIFIED_S_BASE.cutoff() == pytest.approx(937e9, rel=0.1)
    at = UNIFIED_S_BASE.cutoff()
    assert UNIFIED_S_BASE.loss(active=at, experts=256) == pytest.approx(UNIFIED_S_BASE.loss(active=at, experts=1))


def test_losses_that_krajewski_et_al_state():
    """Table 2 there; its law has three digits, which the losses show by 0.03."""
    for active, tokens, granularity, loss in (
        (1e8, 4.37e9, 8, 3.133),
        (7e9, 137.6e9, 32, 2.076),
        (1e12, 7.94e12, 64, 1.367),
    ):
        found = GRANULARITY.loss(total_non_embedding=active / 12 * 516, tokens=tokens, granularity=granularity)
        assert found == pytest.approx(loss, abs=0.03)


def test_flops_that_krajewski_et_al_state():
    for active, tokens, granularity, flops in (
        (1e8, 4.37e9, 8, 2.95e18),
        (1e9, 28.94e9, 16, 1.93e20),
        (1e12, 7.94e12, 64, 4.97e25),
    ):
        found = tokens * GRANULARITY.flops_per_token(active / 12 * 516, {"granularity": granularity})
        assert found == pytest.approx(flops, rel=0.005)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_more_of_everything_is_better_where_the_papers_measured(name):
    law = PUBLISHED[name]
    columns = GRIDS[law.kind]
    for column in set(law.columns) - {"sparsity"}:  # at a fixed total, more sparsity is fewer active parameters
        better = law.loss(**columns | {column: 1.01 * columns[column]}) < law.loss(**columns)
        if law.kind == "joint" and column == "experts":
            # With few tokens for its size a model is better off with fewer experts: an effect that this law has.
            assert not np.all(better)
            better = better[columns["tokens"] >= 10 * columns["active"]]
        assert np.all(better), column


@pytest.mark.parametrize("kind", sorted(LAWS))
def test_a_law_declares_what_it_is(kind):
    law = LAWS[kind]
    assert list(law.coefficients) and set(law.coefficients) == {field.name for field in dataclasses.fields(law)}  # type: ignore[arg-type]
    assert set(law.columns) <= set(LIMITS) - {"loss"} and "arXiv" not in law.source and "(2" in law.source
    published = PUBLISHED[kind]
    for name, value in published.values().items():
        low, high = law.coefficients[name].bounds
        assert low <= value <= high and (value > 0 or not law.coefficients[name].positive)


@pytest.mark.parametrize("kind", sorted(LAWS))
def test_formulas_are_linear_where_they_say_so(kind):
    law, published = LAWS[kind], PUBLISHED[kind]
    x = types.SimpleNamespace(**{name: column[:7] for name, column in GRIDS[kind].items()})
    linear = {name for name, one in law.coefficients.items() if one.linear}
    zero = published.values() | dict.fromkeys(linear, 0.0)

    def value(coefficients):
        found = law.formula(types.SimpleNamespace(**coefficients), x)
        return np.log(found) if law.log_linear else found + np.zeros(7)

    parts = sum(value(zero | {name: published.values()[name]}) for name in linear)
    assert parts == pytest.approx(value(published.values()))


def test_errors_name_the_column():
    with pytest.raises(ConfigError, match=r"columns.tokens=None: is missing; the law chinchilla needs active, tokens"):
        CHINCHILLA.loss(active=1e9)
    with pytest.raises(ConfigError, match=r"columns.expert=8.* did you mean 'experts'"):
        JOINT.loss(active=1e9, tokens=1e9, experts=8, expert=8)
    with pytest.raises(ConfigError, match="has no term in tokens"):
        UNIFIED_S_BASE.flops_per_token(1e9, {"experts": 8})


def test_losses_are_arrays_of_the_columns_shape():
    assert CHINCHILLA.loss(active=[1e8, 1e9], tokens=1e10).shape == (2,)
    assert math.isfinite(float(CHINCHILLA.loss(active=1e8, tokens=1e10)))
