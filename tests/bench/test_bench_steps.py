"""The step that is timed is the step that trains."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny

from sparse_lm.bench import steps
from sparse_lm.bench.harness import Options
from sparse_lm.bench.steps import random_batch, stepper, train_step
from sparse_lm.config import ConfigError
from sparse_lm.experiment import resolved
from sparse_lm.models.counts import count, dense_twin

EXPERIMENT = tiny.experiment(model__dropout=0.0, model__num_layers=1, model__moe__every=1)


@pytest.fixture(autouse=True)
def known_peak(monkeypatch):
    peaks = iter([1e9, 0.5e9])  # before and after
    monkeypatch.setattr(steps, "matmul_peak", lambda dtype: next(peaks))


def test_one_row_with_the_flops_of_both(monkeypatch):
    taken = []

    def fake(experiment, mesh):
        assert (mesh.size, experiment.data, experiment.train) == (8, EXPERIMENT.data, EXPERIMENT.train)
        return lambda: taken.append(experiment.model)

    monkeypatch.setattr(steps, "stepper", fake)
    (row,) = train_step(Options(EXPERIMENT, quick=True, repeats=2))
    model = resolved(EXPERIMENT, 8).model
    assert row.tokens == 8 * 16
    assert row.flops == 8 * 16 * count(model).flops_per_token(16)
    assert row.flops_against == 8 * 16 * count(dense_twin(model)).flops_per_token(16)
    assert row.flops > row.flops_against  # by the router
    assert (row.case, row.against) == ("E=4 k=2 gather", "dense twin")
    assert row.peak == 1e9  # virtual devices share the cores
    assert row.paired.repeats == 2
    assert row.work is None
    assert taken == [model, dense_twin(model)] * 3  # one pair to warm up


def test_the_timed_function_trains(mesh_of):
    mesh = mesh_of(data=1)
    with jax.set_mesh(mesh):
        call = stepper(resolved(EXPERIMENT, 8), mesh)
        losses = [call() for _ in range(6)]
    assert np.all(np.isfinite(losses))
    assert losses[-1] < losses[0]  # the same batch again and again


def test_the_batch_is_full_of_targets():
    batch = random_batch(resolved(EXPERIMENT, 8))
    assert batch.tokens_BL.shape == (8, 17)
    assert set(np.unique(batch.tokens_BL)) == set(range(8))
    assert np.all(np.asarray(batch.segments_BL) == 1)
    assert np.all(np.asarray(batch.targets_BL) == 1)
    np.testing.assert_array_equal(batch.positions_BL[3], np.arange(17))
    assert {np.asarray(leaf).dtype.name for leaf in jax.tree.leaves(batch)} == {"int32"}
    np.testing.assert_array_equal(batch.tokens_BL, random_batch(resolved(EXPERIMENT, 8)).tokens_BL)


def test_a_dense_model_is_refused():
    dense = EXPERIMENT.replace(model=dense_twin(EXPERIMENT.model))
    with pytest.raises(ConfigError, match="it is its own twin"):
        train_step(Options(dense))


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="mesh"):
        train_step(Options(EXPERIMENT.replace(mesh__expert=3)))
