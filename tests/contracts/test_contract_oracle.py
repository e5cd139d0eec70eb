"""The oracle itself: both of its programs agree, and its parts give what one can compute by hand."""

from __future__ import annotations

import dataclasses

import cases
import harness
import numpy as np
import oracle
import pytest


@pytest.mark.parametrize("name", cases.ROUTER_CASES)
def test_the_literal_and_the_differentiable_program_agree(name):
    answer, loss, _, _ = harness.expected(name)
    np.testing.assert_allclose(loss, answer.loss, rtol=1e-12)


@pytest.mark.parametrize(
    "name",
    ["switch", "top2_after_drop", "mixtral", "threshold", "fine_grained", "deepseek_v3", "deepseek_v2", "remoe"],
)
def test_gradients_by_finite_differences_of_the_literal_program(name):
    problem = harness.problem_of(name)
    _, _, d_weights, d_x = harness.expected(name)
    rng, step = np.random.default_rng(0), 1e-6
    for key, gradient in {**d_weights, "x": d_x}.items():
        direction = rng.normal(size=gradient.shape)
        losses = [oracle.layer(_moved(problem, key, sign * step * direction)).loss for sign in (1, -1)]
        slope = (losses[0] - losses[1]) / (2 * step)
        np.testing.assert_allclose(slope, np.sum(gradient * direction), rtol=2e-5, err_msg=key)


def _moved(problem, key, change):
    if key == "x":
        return dataclasses.replace(problem, x_BLD=problem.x_BLD + change)
    weights = {**problem.weights, key: problem.weights[key] + change}
    return dataclasses.replace(problem, weights=weights)


@pytest.mark.parametrize("name", [name for name, case in cases.ROUTER_CASES.items() if case.drops])
def test_every_case_drops_some_and_keeps_most(name):
    answer = harness.expected(name)[0]
    used, kept = answer.used_TK.sum(), answer.kept_TK.sum()
    assert used * 0.5 < kept < used, (kept, used)


def test_dropless_drops_nothing_and_threshold_declines_some():
    dropless = harness.expected("dropless")[0]
    assert np.array_equal(dropless.used_TK, dropless.kept_TK)
    assert sum(unit.declined for unit in harness.expected("threshold")[0].units) > 5
    first_only = harness.expected("first_only")[0]
    assert not first_only.used_TK[:, 1].any()


def test_padding_asks_for_nothing():
    answer = harness.expected("top2")[0]
    assert not answer.used_TK[~harness.inputs()[1].reshape(-1)].any()
    assert answer.units[10].tokens == 0
    assert answer.units[10].padding == harness.LENGTH


@pytest.mark.parametrize(
    ("priority", "expected"),
    [
        ("first_choice", [[1, 0], [1, 1], [1, 1], [1, 0]]),  # 0, 1 take expert 0; 2, 3 expert 1; then 1, 2 expert 2
        ("token", [[1, 1], [1, 1], [1, 1], [0, 0]]),  # token 3 finds experts 1 and 2 full
        ("probability", [[1, 0], [1, 1], [1, 0], [1, 1]]),  # expert 1: 0.8 and 0.7; expert 2: 0.6 and 0.55
        ("batch", [[1, 0], [1, 0], [1, 1], [1, 1]]),  # expert 2: 2 (0.8) and 3 (0.7) are surer than 1 (0.6)
        ("random", [[1, 1], [1, 1], [1, 1], [0, 0]]),  # in evaluation as by token
    ],
)
def test_slots_by_hand(priority, expected):
    expert_SK = [[0, 1], [0, 2], [1, 2], [1, 2]]
    gate_SK = [[0.9, 0.1], [0.2, 0.6], [0.8, 0.5], [0.7, 0.55]]
    np.testing.assert_array_equal(oracle.hand_out_slots(expert_SK, gate_SK, 2, priority), np.array(expected, bool))


def test_capacity_is_exact():
    assert oracle.slots_per_expert(1.1, 2, 100, 4) == 55
    assert oracle.slots_per_expert(1.25, 2, 100, 8) == 32
    assert oracle.slots_per_expert(None, 2, 7, 8) == oracle.slots_per_expert(99.0, 2, 7, 8) == 7
