"""Evaluation on held-out rows against sums made by hand."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparse_lm.data.loader import build_dataset, validation_batches
from sparse_lm.evals.perplexity import Evaluation, make_evaluate
from sparse_lm.experiment import resolved
from sparse_lm.models.config import DepthConfig
from sparse_lm.models.decoder import build_decoder
from sparse_lm.sharding import DEFAULT, put

CONFIG = tiny.experiment(model__moe__capacity_factor_eval=0.5)
DATASET = build_dataset(CONFIG.data, CONFIG.seed)
HOST = validation_batches(DATASET, 8, 100)
BATCHES = [jax.tree.map(jnp.asarray, batch) for batch in HOST]
EVALUATE = make_evaluate(DATASET.domains)


def model(**changes):
    return build_decoder(jax.random.key(0), resolved(CONFIG.replace(**changes), DATASET.vocab_size).model, DEFAULT)


SPARSE = model()


def test_the_loss_is_that_of_all_targets_by_hand():
    nats, targets = {}, {}
    for batch, host in zip(BATCHES, HOST, strict=True):
        logits, _ = SPARSE(batch.tokens_BL[:, :-1], batch.segments_BL[:, :-1], batch.positions_BL[:, :-1])
        log_probability = np.asarray(jax.nn.log_softmax(logits), np.float64)
        for row, place in np.argwhere(host.segments_BL[:, 1:] > 0):
            same = host.segments_BL[row, place] == host.segments_BL[row, place + 1]
            if same and host.targets_BL[row, place + 1]:
                name = DATASET.domains[host.domains_BL[row, place + 1]]
                nats[name] = nats.get(name, 0) - log_probability[row, place, host.tokens_BL[row, place + 1]]
                targets[name] = targets.get(name, 0) + 1
    found = EVALUATE(SPARSE, BATCHES)
    assert found.targets == sum(targets.values())
    assert found.loss == pytest.approx(sum(nats.values()) / sum(targets.values()), rel=1e-5)
    assert found.by_domain == pytest.approx({name: nats[name] / targets[name] for name in nats}, rel=1e-5)


def test_empty_rows_count_in_nothing():
    assert not np.all(HOST[-1].segments_BL.any(axis=1))  # the last batch is filled up
    found = EVALUATE(SPARSE, BATCHES)
    assert found.targets == sum(
        len(DATASET.validation[i].targets_BL.nonzero()[0]) for i in range(len(DATASET.validation))
    )
    empty = jax.tree.map(jnp.zeros_like, BATCHES[-1])
    assert EVALUATE(SPARSE, [*BATCHES, empty]) == found
    nothing = EVALUATE(SPARSE, [empty])
    assert (nothing.loss, nothing.by_domain, nothing.targets, nothing.dropped_fraction) == (0.0, {}, 0, 0.0)


def test_it_does_not_depend_on_the_size_of_the_batches():
    small = [jax.tree.map(lambda x, i=i: x[i : i + 2], batch) for batch in BATCHES for i in range(0, 8, 2)]
    found, expected = EVALUATE(SPARSE, small), EVALUATE(SPARSE, BATCHES)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert (found.targets, found.dropped_fraction) == (expected.targets, expected.dropped_fraction)
    assert found.max_violation == pytest.approx(expected.max_violation, rel=1e-6)


def test_evaluation_is_free_of_noise_and_has_its_own_capacity():
    assert EVALUATE(SPARSE, BATCHES) == EVALUATE(SPARSE, BATCHES)
    free = EVALUATE(model(model__moe__capacity_factor_eval=None), BATCHES)
    tight = EVALUATE(SPARSE, BATCHES)
    assert free.dropped_fraction == 0 and tight.dropped_fraction is not None
    assert 0.4 <= tight.dropped_fraction < 0.8  # slots for half of a full row; padding takes none
    assert free.max_violation is not None and free.max_violation >= 0


def test_a_dense_model_has_no_routing():
    found = EVALUATE(model(model__moe=None), BATCHES)
    assert (found.dropped_fraction, found.max_violation) == (None, None)
    assert math.isfinite(found.loss)


def test_layers_that_tokens_skip_are_counted_over_all_batches():
    depth = DepthConfig(capacity=0.25, every=1, allow_non_causal=True)
    found = EVALUATE(model(model__depth=depth), BATCHES)
    assert found.depth is not None
    real = sum(int((batch.segments_BL[:, :-1] > 0).sum()) for batch in BATCHES)
    np.testing.assert_array_equal(found.depth.processed + found.depth.skipped, [real, real])
    assert np.all((found.depth.agreed > 0) & (found.depth.agreed < real))
    assert EVALUATE(SPARSE, BATCHES).depth is None


def test_a_mesh_changes_nothing(mesh_of):
    mesh = mesh_of(data=2, expert=2, model=2)
    with jax.set_mesh(mesh):
        placed = [jax.tree.map(lambda x: put(mesh, DEFAULT, x, "B."), batch) for batch in HOST]
        found = EVALUATE(jax.jit(DEFAULT.shard_parameters)(SPARSE), placed)
    expected = EVALUATE(SPARSE, BATCHES)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert (found.targets, found.dropped_fraction) == (expected.targets, expected.dropped_fraction)


@pytest.mark.parametrize(("per_target", "expected"), [(1.0, 2.0), (0.5, 4.0), (None, None)])
def test_bits_per_byte(per_target, expected):
    found = Evaluation(2 * math.log(2), {}, 10, None, None).bits_per_byte(per_target)
    assert found == (None if expected is None else pytest.approx(expected))
