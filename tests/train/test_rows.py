"""Rows of metrics from sums that were counted by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from sparse_lm.evals.perplexity import Evaluation
from sparse_lm.models.reports import DepthStats
from sparse_lm.moe.types import HISTOGRAM_BINS, POSITION_BINS, DispatchStats, LayerStats, RouterStats
from sparse_lm.objectives.causal import LossParts, RoutingParts
from sparse_lm.train.rows import depth_row, gini, layer_arrays, train_row, validation_row
from sparse_lm.train.step import StepMetrics

ROUTING = {
    "dropped_fraction",
    "declined_fraction",
    "load_balance",
    "router_z",
    "router_entropy",
    "max_violation",
    "gini",
    "kept_gate_mass",
    "served",
}
BASE = {"step", "split", "loss", "total_loss", "gradient_norm", "nonfinite_steps", "dropped_fraction"}


def host(numbers) -> Any:
    """Arrays as `jax.device_get` returns them, whose type is not that of the fields."""
    return np.asarray(numbers)


def stats() -> LayerStats:
    """Two layers, two experts, top-2 of 10 real tokens in one unit; three choices of layer 0 were declined."""
    router = RouterStats(
        tokens_U=host([[10], [10]]),
        padding_U=host([[6], [6]]),
        declined_U=host([[4], [0]]),
        load_UE=host([[[12, 4]], [[10, 10]]]),
        importance_UE=host([[[6.0, 4.0]], [[5.0, 5.0]]]),
        z_U=host([[20.0], [10.0]]),
        entropy_U=host([[5.0], [7.0]]),
        penalty_U=host(np.zeros((2, 1))),
    )
    by_place = host(np.zeros((2, POSITION_BINS), int))
    by_place[:, 0], by_place[:, 15] = 4, 12
    dropped = host(np.zeros((2, POSITION_BINS), int))
    dropped[0, 15], dropped[1, 15] = 6, 3
    histogram = host(np.zeros((2, HISTOGRAM_BINS), int))
    histogram[0, 3] = 10
    dispatch = DispatchStats(
        kept=host([10, 17]),
        dropped=host([6, 3]),
        served=host([[2, 6, 2], [0, 3, 7]]),
        gate_histogram=histogram,
        routed_by_position=by_place,
        dropped_by_position=dropped,
        dropped_E=host([[6, 0], [1, 2]]),
        gate_mass=host([10.0, 10.0]),
        kept_gate_mass=host([6.0, 9.0]),
    )
    return LayerStats(router, dispatch)


def metrics(layer_stats: LayerStats | None) -> StepMetrics:
    two = host([]) if layer_stats is None else host([1.2, 1.0])
    parts = LossParts(
        loss=host(np.float32(2.5)),
        load_balance_N=two,
        z_N=two,
        domain_loss=host([20.0, 5.0]),
        domain_targets=host([8.0, 2.0]),
        stats=layer_stats,
    )
    return StepMetrics(host(2.75), parts, host(0.5), host(True), host(3), host(0))


def test_a_dense_row_has_nothing_of_routing():
    row = train_row(7, metrics(None), layers=True)
    assert row.keys() == BASE
    assert row == {
        "step": 7,
        "split": "train",
        "loss": 2.5,
        "total_loss": 2.75,
        "gradient_norm": 0.5,
        "nonfinite_steps": 3,
        "dropped_fraction": 0.0,
    }


def test_a_sparse_row_has_the_numbers_of_all_layers():
    row = train_row(7, metrics(stats()), layers=False)
    assert row.keys() == BASE | ROUTING
    assert row["dropped_fraction"] == pytest.approx(9 / 36)
    assert row["declined_fraction"] == pytest.approx(4 / 40)
    assert row["load_balance"] == row["router_z"] == pytest.approx(1.1)
    assert row["router_entropy"] == pytest.approx(12 / 20)
    assert row["max_violation"] == pytest.approx((12 / 8 - 1 + 0) / 2)
    assert row["gini"] == pytest.approx((0.25 + 0) / 2)
    assert row["kept_gate_mass"] == pytest.approx(15 / 20)
    assert row["served"] == [0.1, 0.45, 0.45]


def test_the_layers_come_on_request():
    row = train_row(7, metrics(stats()), layers=True)
    assert row.keys() == BASE | ROUTING | {"layers"}
    layers = row["layers"]
    assert layers == layer_arrays(stats())
    assert layers["load"] == [[0.75, 0.25], [0.5, 0.5]]
    assert layers["dropped"] == [0.375, 0.15]
    assert layers["entropy"] == [0.5, 0.7]
    assert layers["gate_histogram"][0] == [0, 0, 0, 10] + [0] * 16
    assert layers["dropped_by_position"] == [0.0] * 15 + [round(9 / 24, 5)]
    assert layers["dropped_by_expert"] == [[0.5, 0.0], [0.1, 0.2]]


ATTENTION = {f"attention_{name}" for name in ROUTING - {"dropped_fraction", "gini", "kept_gate_mass", "served"}}


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_attention_experts_have_columns_of_their_own(sparse):
    step = metrics(stats() if sparse else None)
    attention = RoutingParts(host([1.5, 1.1]), host([2.0, 4.0]), stats())
    row = train_row(7, dataclasses.replace(step, parts=dataclasses.replace(step.parts, attention=attention)), True)
    assert row.keys() == BASE | (ROUTING if sparse else set()) | ATTENTION | {"layers"}
    assert row["attention_load_balance"] == pytest.approx(1.3)
    assert row["attention_router_z"] == pytest.approx(3.0)
    assert row["attention_router_entropy"] == pytest.approx(12 / 20)
    assert row["attention_max_violation"] == pytest.approx(0.25)
    assert row["attention_declined_fraction"] == pytest.approx(4 / 40)
    assert row["layers"]["attention_load"] == [[0.75, 0.25], [0.5, 0.5]]
    assert ("load" in row["layers"]) == sparse
    without = train_row(7, dataclasses.replace(step, parts=dataclasses.replace(step.parts, attention=attention)), False)
    assert "layers" not in without


def depth_stats() -> DepthStats:
    """Two wrapped layers, which 5 and 3 of 20 real tokens pass."""
    return DepthStats(
        host([5, 3]), host([15, 17]), host([4, 4]), chosen=host([5, 5]), agreed=host([14, 18]), loss=host([8.0, 2.0])
    )


def test_what_skips_layers_is_in_the_row_of_a_dense_model_and_of_an_evaluation():
    step = metrics(None)
    step = dataclasses.replace(step, parts=dataclasses.replace(step.parts, depth=depth_stats()))
    row = train_row(7, step, layers=False)
    expected = {
        "depth_processed": pytest.approx(8 / 40),
        "depth_accuracy": pytest.approx(32 / 40),
        "depth_loss": pytest.approx(10 / 40),
        "depth_processed_by_layer": [0.25, 0.15],
    }
    assert row.keys() == BASE | expected.keys()
    assert {key: row[key] for key in expected} == expected
    evaluation = Evaluation(1.0, {}, 40, None, None, depth_stats())
    assert validation_row(7, evaluation, None, None).items() >= expected.items()
    zero = jax.tree.map(np.zeros_like, depth_stats())
    assert depth_row(zero)["depth_processed"] == 0 and depth_row(zero)["depth_processed_by_layer"] == [0, 0]


def test_layers_without_a_token_are_zeros_not_errors():
    empty = stats()
    zero = LayerStats(
        RouterStats(**{name: np.zeros_like(value) for name, value in vars(empty.router).items()}),
        DispatchStats(**{name: np.zeros_like(value) for name, value in vars(empty.dispatch).items()}),
    )
    row = train_row(1, metrics(zero), layers=True)
    assert [row[key] for key in ("dropped_fraction", "declined_fraction", "router_entropy", "gini")] == [0, 0, 0, 0]
    assert row["layers"]["load"] == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ([1, 1, 1, 1], 0),
        ([5], 0),
        ([0, 0, 0, 8], 0.75),
        ([0, 0], 0),
        ([1, 3], 0.25),
        ([3, 1], 0.25),
        ([1, 2, 3], 2 / 9),
    ],
)
def test_gini_by_hand(load, expected):
    assert gini(np.array(load, float)) == pytest.approx(expected)


def test_gini_is_half_the_relative_mean_difference():
    load = np.random.default_rng(0).integers(0, 50, 16).astype(float)
    expected = np.abs(load[:, None] - load[None, :]).mean() / (2 * load.mean())
    assert gini(load) == pytest.approx(expected)


def test_a_validation_row():
    evaluation = Evaluation(
        loss=np.log(2) * 3, by_domain={"a": 2.0}, targets=40, dropped_fraction=0.1, max_violation=0.5
    )
    row = validation_row(9, evaluation, bytes_per_target=0.5, entropy=2.0)
    assert row == {
        "step": 9,
        "split": "validation",
        "loss": evaluation.loss,
        "bits_per_byte": pytest.approx(6.0),
        "entropy_gap": pytest.approx(np.log(2) * 3 - 2.0),
        "losses_by_domain": {"a": 2.0},
        "targets": 40,
        "dropped_fraction": 0.1,
        "max_violation": 0.5,
    }
    bare = validation_row(9, evaluation, bytes_per_target=None, entropy=None)
    assert bare["bits_per_byte"] is None and bare["entropy_gap"] is None
