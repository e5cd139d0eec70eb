"""Routers with noise and losses of their own, and the random priority, in whole models: the same on every mesh, under
remat, and however the batch is cut."""

from __future__ import annotations

import functools

import cases
import decoders
import harness
import numpy as np
import pytest
from decoders import decoder_config
from harness import deviation

from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers.fixed_noise import FixedNoise
from sparse_lm.moe.routers.noisy_top_k import NoisyTopK
from sparse_lm.moe.routers.sparse_mixer import SparseMixer

TOLERANCE = 1e-5

NOISY: dict[str, MoEConfig] = {
    "noisy_top_k": cases.moe(
        2, NoisyTopK(importance=1.0, load=1.0, init_scale=1.0), priority="random", allow_non_causal=True
    ),
    "fixed_noise": cases.moe(2, FixedNoise(importance=1.0, load=1.0), priority="batch", allow_non_causal=True),
    "sparse_mixer": cases.moe(2, SparseMixer(jitter=0.3), priority="token"),
    "sample": cases.moe(2, {"sample": True, "input_dropout": 0.1}, priority="token"),
}
RANDOM = cases.moe(2, {"renormalise": "after_drop"}, priority="random", allow_non_causal=True)


def differences(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Deviations above the tolerance, by name; counts have to be equal."""
    assert got.keys() == expected.keys()
    found = {}
    for name, value in expected.items():
        if np.issubdtype(value.dtype, np.floating):
            found[name] = deviation(got[name], value)
        else:
            np.testing.assert_array_equal(got[name], value, err_msg=name)
    return {name: value for name, value in found.items() if value > TOLERANCE}


@functools.cache
def trained(name: str):
    return decoders.train(decoder_config(NOISY[name]), None)[0]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "sparse_mixer" else pytest.mark.slow) for n in NOISY]
)
def test_training_with_noise_is_the_same_on_a_mesh_and_under_remat(name, mesh_of):
    config = decoder_config(NOISY[name].replace(dispatcher="all_to_all"), remat="full")
    (got,) = decoders.train(config, mesh_of(data=2, expert=4))
    assert not differences(got.metrics, trained(name).metrics)
    assert not differences(got.state, trained(name).state)


def test_the_matrix_of_the_noise_is_trained():
    state = trained("noisy_top_k").state
    traces = [value for key, value in state.items() if "trace" in key and "noise_DE" in key]
    assert len(traces) == 1
    assert np.abs(traces[0]).max() > 1e-6


@pytest.mark.parametrize("name", ["noisy_top_k", "fixed_noise"])
def test_the_losses_of_the_router_are_part_of_the_total(name):
    metrics = trained(name).metrics
    parts = metrics["parts/loss"] + 0.01 * metrics["parts/load_balance_N"].sum() + 0.001 * metrics["parts/z_N"].sum()
    tokens = metrics["parts/stats/router/tokens_U"].sum(-1)
    penalty = metrics["parts/stats/router/penalty_U"].sum(-1) / tokens
    assert np.all(penalty > 0.01)
    np.testing.assert_allclose(metrics["total"], parts + penalty.sum(), rtol=1e-5)


def test_losses_per_group_add_up_over_microbatches():
    """Without noise, which differs from cut to cut; the losses are squares of sums over a group."""
    config = decoder_config(cases.moe(2, FixedNoise(noise=0.0, importance=1.0, load=1.0), priority="token"))
    assert not differences(decoders.gradients(config, 4), decoders.gradients(config))


@pytest.mark.parametrize("dispatcher", cases.LIMITED)
def test_random_order_is_the_same_with_every_dispatcher_and_on_a_mesh(dispatcher, mesh_of):
    case = cases.Case(RANDOM.replace(dispatcher=dispatcher))
    alone, reference = harness.run(case), harness.run(cases.Case(RANDOM.replace(dispatcher="dense")))
    for got in (alone, harness.run(case, mesh_of(data=2, expert=4))):
        assert got.unaccounted == 0
        np.testing.assert_array_equal(
            got.stats.dispatch.dropped_by_position, reference.stats.dispatch.dropped_by_position
        )
        assert deviation(got.y_BLD, reference.y_BLD) < TOLERANCE
        assert deviation(got.d_x, reference.d_x) < TOLERANCE


def test_random_order_drops_early_tokens_too_and_is_by_token_in_evaluation():
    by_token = cases.Case(RANDOM.replace(priority="token"))
    random = harness.run(cases.Case(RANDOM)).stats.dispatch
    token = harness.run(by_token).stats.dispatch
    assert token.dropped_by_position[0] == 0  # of each group's first token nothing is ever dropped
    assert random.dropped_by_position[0] > 0
    assert int(random.kept) == int(token.kept)
    quiet = [harness.run(cases.Case(moe, training=False)).y_BLD for moe in (RANDOM, by_token.moe)]
    np.testing.assert_array_equal(quiet[0], quiet[1])
