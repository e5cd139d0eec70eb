"""Saturation over the checkpoints of a run."""

from __future__ import annotations

import analysis_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_lm.analysis.history as history
from sparse_lm.analysis.history import saturation_over
from sparse_lm.analysis.observe import observe
from sparse_lm.evals.routing import record, saturation
from sparse_lm.train.manifest import CheckpointError


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return cases.write_run(tmp_path_factory.mktemp("runs") / "a", {2: 5, 4: 1, 6: 1})


def found(workdir, step=6, seed=1):
    return saturation_over(workdir, step, cases.BATCHES, observe(cases.model(seed), cases.BATCHES).decisions, 0.5)


def test_every_checkpoint_against_the_one(workdir):
    result = found(workdir)
    assert result.steps == (2, 4, 6) and result.chance == 0.5
    np.testing.assert_array_equal(result.share_XN[1:], 1.0)  # the same weights
    device = [jax.tree.map(jnp.asarray, batch) for batch in cases.BATCHES]
    each = [saturation(record(cases.model(5), batch), record(cases.model(1), batch)) for batch in device]
    tokens = [int(np.sum(np.asarray(batch.segments_BL)[:, :-1] > 0)) for batch in cases.BATCHES]
    np.testing.assert_allclose(result.share_XN[0], np.average(each, axis=0, weights=tokens))
    assert (result.share_XN[0] < 0.95).all()


def test_an_earlier_step_may_be_the_one(workdir):
    result = found(workdir, step=2, seed=5)
    np.testing.assert_array_equal(result.share_XN[0], 1.0)
    assert (result.share_XN[1:] < 0.95).all()


def test_a_checkpoint_that_vanishes_meanwhile_is_left_out_and_a_damaged_one_is_not(workdir, monkeypatch):
    load = history.load_model

    def failing(kind):
        def load_model(directory, step):
            if step == 4:
                raise CheckpointError(directory, step, kind, "gone")
            return load(directory, step)

        return load_model

    monkeypatch.setattr(history, "load_model", failing("absent"))
    assert found(workdir).steps == (2, 6)
    monkeypatch.setattr(history, "load_model", failing("corrupt"))
    with pytest.raises(CheckpointError, match="gone"):
        found(workdir)
