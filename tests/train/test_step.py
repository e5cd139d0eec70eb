"""One training step: the optimizer's update of the batch's gradients, and what happens to a step that is lost."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx

from sparse_lm.data.loader import TrainLoader, build_dataset
from sparse_lm.experiment import resolved
from sparse_lm.sharding import DEFAULT
from sparse_lm.train.accumulate import loss_and_gradients
from sparse_lm.train.state import create_state
from sparse_lm.train.step import make_train_step

CONFIG = tiny.experiment()
DATASET = build_dataset(CONFIG.data, CONFIG.seed)
MODEL = resolved(CONFIG, DATASET.vocab_size).model
ROOT = jax.random.key(7)
DOMAINS = len(DATASET.domains)
OPTIMIZER = optax.sgd(0.5, momentum=0.9)
STEP = make_train_step(OPTIMIZER, 1, DOMAINS)


def fresh():
    return jax.jit(create_state, static_argnums=(1, 2, 3))(jax.random.key(0), MODEL, OPTIMIZER, DEFAULT)


def batch(step: int = 0):
    return jax.tree.map(jnp.asarray, TrainLoader(DATASET, 8, 0).batch_at(step))


def host(tree):
    """A copy on the host that a donation cannot take away."""
    return jax.tree.map(np.array, tree)


def parameters(state):
    return host(nnx.split(state.model, nnx.Param, ...)[1])


def poisoned(state):
    """The state with one weight that is not a number."""
    table = state.model.embedding.table_VD
    table[...] = table[...].at[0, 0].set(jnp.nan)
    return state


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_step_is_one_update_by_the_gradients_of_the_batch():
    state = fresh()
    before = parameters(state)
    key = jax.random.fold_in(ROOT, 0)
    function = jax.jit(loss_and_gradients, static_argnums=(3, 4))
    total, parts, gradients = jax.device_get(function(state.model, batch(), key, 1, DOMAINS))
    new, metrics = STEP(state, batch(), ROOT)
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, before, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), parameters(new), expected)
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradients)))
    assert float(metrics.gradient_norm) == pytest.approx(norm, rel=1e-5)
    assert float(metrics.total) == pytest.approx(float(total), rel=1e-6)
    assert float(metrics.parts.loss) == pytest.approx(float(parts.loss), rel=1e-6)
    assert int(new.step) == 1 and bool(metrics.finite)


def test_the_total_is_the_loss_and_the_weighted_router_losses():
    assert MODEL.moe is not None
    balance = MODEL.moe.balance
    _, metrics = STEP(fresh(), batch(), ROOT)
    parts = metrics.parts
    router = balance.load * parts.load_balance_N.sum() + balance.z * parts.z_N.sum()
    assert float(router) > 0
    assert float(metrics.total) == pytest.approx(float(parts.loss + router), rel=1e-6)


def test_steps_are_repeatable_and_their_noise_is_their_own():
    losses = [float(STEP(fresh(), batch(), ROOT)[1].total) for _ in range(2)]
    assert losses[0] == losses[1]
    later = fresh()
    later = type(later)(later.step + 3, later.model, later.optimizer, later.nonfinite, later.nonfinite_in_a_row)
    assert float(STEP(later, batch(), ROOT)[1].total) != losses[0]  # dropout of step 3


def test_a_lost_step_changes_nothing_and_is_counted():
    state = poisoned(fresh())
    before, optimizer = parameters(state), host(state.optimizer)
    counts = []
    for _ in range(3):
        state, metrics = STEP(state, batch(), ROOT)
        assert not bool(metrics.finite)
        counts.append((int(metrics.nonfinite), int(metrics.nonfinite_in_a_row)))
    assert counts == [(1, 1), (2, 2), (3, 3)]
    assert int(state.step) == 3
    assert_same(parameters(state), before)
    assert_same(host(state.optimizer), optimizer)


def test_a_good_step_ends_the_row_of_lost_ones():
    state = fresh()
    state = type(state)(state.step, state.model, state.optimizer, state.nonfinite + 5, state.nonfinite_in_a_row + 4)
    state, metrics = STEP(state, batch(), ROOT)
    assert (int(metrics.nonfinite), int(metrics.nonfinite_in_a_row)) == (5, 0)
    assert (int(state.nonfinite), int(state.nonfinite_in_a_row)) == (5, 0)


def test_the_state_is_donated():
    state = fresh()
    STEP(state, batch(), ROOT)
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(state.model.embedding.table_VD[...])
