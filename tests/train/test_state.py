"""A fresh training state: what is in it, and where it lies."""

from __future__ import annotations

import jax
import numpy as np
import tiny
from flax import nnx

from sparse_lm.experiment import resolved
from sparse_lm.optim.build import build_optimizer
from sparse_lm.rules import STRATEGIES
from sparse_lm.sharding import DEFAULT, Rules
from sparse_lm.train.state import TrainState, create_state

CONFIG = resolved(tiny.experiment(model__moe__every=1), 8)
OPTIMIZER = build_optimizer(CONFIG.optim, 10)


def create(seed: int = 0, rules: Rules = DEFAULT) -> TrainState:
    return jax.jit(create_state, static_argnums=(1, 2, 3))(jax.random.key(seed), CONFIG.model, OPTIMIZER, rules)


def leaves(tree):
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def test_counters_start_at_zero():
    state = create()
    assert [int(x) for x in (state.step, state.nonfinite, state.nonfinite_in_a_row)] == [0, 0, 0]
    assert {x.dtype.name for x in (state.step, state.nonfinite, state.nonfinite_in_a_row)} == {"int32"}


def test_the_optimizer_holds_two_moments_of_every_parameter():
    state = create()
    parameters = jax.tree.map(np.shape, leaves(nnx.split(state.model, nnx.Param, ...)[1]))
    moments = leaves(state.optimizer)
    for name, shape in parameters.items():
        found = [leaf for path, leaf in moments.items() if path.endswith("/" + name)]
        assert [leaf.shape for leaf in found] == [shape, shape]
        assert not any(np.any(np.asarray(leaf)) for leaf in found)


def test_the_key_decides_the_weights():
    one, same, other = (leaves(create(seed).model) for seed in (0, 0, 1))
    for name, leaf in one.items():
        assert np.array_equal(leaf, same[name])
    assert not np.array_equal(one["embedding/table_VD/value"], other["embedding/table_VD/value"])


def test_all_of_it_is_laid_out_by_the_rules(mesh_of):
    with jax.set_mesh(mesh_of(fsdp=2, expert=2, model=2)):
        state = create()
    up = [leaf for path, leaf in leaves(state).items() if path.endswith("up_EDF/value")]
    assert len(up) == 3  # the weights and their two moments
    for leaf in up:
        layers, experts, width, hidden = leaf.shape
        assert leaf.sharding.shard_shape(leaf.shape) == (layers, experts // 2, width // 2, hidden // 2)


def test_zero_cuts_the_optimizer_state_alone(mesh_of):
    with jax.set_mesh(mesh_of(data=2, fsdp=2, expert=2)):
        state = leaves(create(rules=STRATEGIES["zero1_ep"]))
    weights, *moments = (leaf for path, leaf in state.items() if path.endswith("up_EDF/value"))
    layers, experts, width, hidden = weights.shape
    assert weights.sharding.shard_shape(weights.shape) == (layers, experts // 2, width, hidden)
    assert len(moments) == 2
    assert all(m.sharding.shard_shape(m.shape) == (layers, experts // 2, width // 4, hidden) for m in moments)


def test_the_mesh_does_not_change_the_weights(mesh_of):
    with jax.set_mesh(mesh_of(fsdp=2, expert=2, model=2)):
        cut = jax.device_get(leaves(create().model))
    for name, leaf in leaves(create().model).items():
        np.testing.assert_allclose(cut[name], leaf, rtol=1e-6, atol=1e-7, err_msg=name)
