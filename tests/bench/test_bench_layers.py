"""Both sides of the layer benchmark do the work that is claimed."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from sparse_lm.bench import layers
from sparse_lm.bench.harness import Options
from sparse_lm.bench.layers import CASES, QUICK, Case, Sizes, compare, moe_layer, time_dense, time_sparse, useful_flops
from sparse_lm.config import ConfigError

SMALL = Sizes(tokens=128, group=32, d_model=16, d_ff=64)
OPTIONS = Options(tiny.experiment())


@pytest.fixture(autouse=True)
def one_device(mesh_of):
    with jax.set_mesh(mesh_of(data=1)):
        yield


def test_the_cases_are_those_that_are_announced():
    assert len(CASES) == len(set(CASES)) == 10
    assert {(case.num_experts, case.top_k) for case in CASES} == {(8, 2), (32, 2), (64, 1)}
    assert [case.num_experts for case in CASES if case.dispatcher == "dense"] == [8]
    for sizes in (Sizes(), QUICK):
        assert sizes.tokens % sizes.group == 0
        assert all(sizes.d_ff % case.top_k == 0 for case in CASES)


def test_useful_flops_by_hand():
    # Forward 2 x tokens x (D F + F D), backward twice that.
    assert useful_flops(SMALL) == 3 * 2 * 128 * (16 * 64 + 64 * 16)
    assert useful_flops(SMALL, 8) - useful_flops(SMALL) == 3 * 2 * 128 * 16 * 8


def test_the_compiler_counts_the_useful_flops_of_the_dense_layer():
    counted = time_dense(SMALL, "float32", "relu").xla_flops
    assert counted == pytest.approx(useful_flops(SMALL), rel=0.05)  # and some for the activation


@pytest.mark.parametrize(
    ("dispatcher", "low", "high"),
    [
        ("gather", 1.25, 1.8),  # the capacity factor, the router, and what is small only in large layers
        ("dense", 4.0, 5.2),  # num_experts / top_k
    ],
)
def test_the_work_beside_the_dense_layer(dispatcher, low, high):
    dense = time_dense(SMALL, "float32", "relu")
    found = compare(Case(8, 2, dispatcher), SMALL, OPTIONS, (dense, 1e9), repeats=1)
    assert low <= found.work <= high
    assert found.case == f"E=8 k=2 {dispatcher}"
    assert (found.tokens, found.peak, found.paired.repeats) == (128, 1e9, 1)
    assert (found.flops, found.flops_against) == (useful_flops(SMALL, 8), useful_flops(SMALL))
    assert found.share > 0


@pytest.mark.parametrize(("dtype", "activation"), [("float32", "gelu"), ("bfloat16", "relu")])
def test_both_ways_give_output_and_gradients(dtype, activation):
    y, (parameters, dx) = time_sparse(Case(4, 2, "gather"), SMALL, dtype, activation).call()  # type: ignore[misc]
    assert y.shape == dx.shape == (4, 32, 16)
    assert y.dtype == dx.dtype == dtype
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(parameters))
    assert shapes == [(4, 16, 32), (4, 32, 16), (16, 4)]  # an expert is half as wide; the router
    for leaf in jax.tree.leaves((y, parameters, dx)):
        assert np.any(np.asarray(leaf, np.float32) != 0)
        assert np.all(np.isfinite(np.asarray(leaf, np.float32)))


def test_dispatchers_compute_the_same():
    results = [time_sparse(Case(4, 2, name), SMALL, "float32", "relu").call() for name in ("gather", "einsum")]
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_work_that_the_compiler_does_not_count_is_left_open():
    dense = dataclasses.replace(time_dense(SMALL, "float32", "relu"), xla_flops=None)
    assert compare(Case(4, 1, "gather"), SMALL, OPTIONS, (dense, 1e9), repeats=1).work is None


def test_a_width_that_cannot_be_shared_is_refused():
    with pytest.raises(ConfigError, match="d_ff=64: must be a multiple of top_k=3"):
        time_sparse(Case(4, 3, "gather"), SMALL, "float32", "relu")


@pytest.mark.parametrize("tokens", [100, -128, 0])
def test_tokens_that_are_not_whole_groups_are_refused(tokens):
    with pytest.raises(ConfigError, match=f"tokens={tokens}: must be a positive multiple of the group size 128"):
        moe_layer(dataclasses.replace(OPTIONS, quick=True, tokens=tokens))


def test_the_benchmark_measures_what_it_is_told(monkeypatch):
    monkeypatch.setattr(layers, "CASES", (Case(4, 1, "gather"),))
    monkeypatch.setattr(layers, "QUICK", SMALL)
    peaks = {"bfloat16": iter([4e9, 5e9])}  # before and after
    monkeypatch.setattr(layers, "matmul_peak", lambda dtype: next(peaks[dtype]))
    options = dataclasses.replace(OPTIONS, quick=True, tokens=64, repeats=2, dtype="bfloat16", activation="gelu")
    (row,) = moe_layer(options)
    assert (row.tokens, row.peak, row.paired.repeats, row.case) == (64, 5e9, 2, "E=4 k=1 gather")
