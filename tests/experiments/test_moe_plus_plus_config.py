"""The configuration of MoE++: the paper's numbers, what a token costs, and the variants."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_lm.config import from_dict, python_file
from sparse_lm.experiment import Experiment, resolved
from sparse_lm.models.counts import count

FILE = Path(__file__).resolve().parents[2] / "configs" / "moe_plus_plus.py"


def variant(name: str) -> Experiment:
    module = python_file(FILE)
    assert module is not None
    return resolved(from_dict(Experiment, module.get_config(name)), 264)


def test_the_numbers_of_the_paper():
    moe = variant("sparse").model.moe
    assert moe is not None and moe.router.pathway
    assert (moe.num_experts, moe.num_free, moe.top_k) == (8, 4, 2)
    assert (moe.free_share, moe.capacity_factor, moe.balance.z) == (0.75, 1.1, 0.0)
    # Its loss: sum_i eta_i f_i P_i with f summing to k, hence k / (8 + 4 / 0.75) at balance, times 0.01.
    assert moe.balance.load == pytest.approx(0.0015)
    assert moe.causal


def test_a_token_costs_three_fifths_of_the_ordinary_experts():
    sparse, ordinary, dense = (count(variant(name).model) for name in ("sparse", "ordinary", "dense"))
    assert sparse.experts.multiplied / ordinary.experts.multiplied == pytest.approx(0.6)  # 1.2 experts of 2
    assert sparse.experts.total == ordinary.experts.total
    assert dense.dense.multiplied == pytest.approx(sparse.experts.multiplied, rel=1e-3)
    assert variant("dense").model.d_ff == round(1.2 * 256)


def test_it_fits_a_mesh_that_does_not_divide_all_experts():
    experiment = variant("sparse").replace(mesh__data=1, mesh__expert=8)
    assert experiment.mesh_sizes(8)["expert"] == 8


def test_another_variant_is_refused():
    with pytest.raises(ValueError, match="the variants are sparse, ordinary, dense"):
        variant("router")
