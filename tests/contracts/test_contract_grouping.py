"""Groups by position across rows: the same layer on permuted tokens, on every mesh, and causal with every router."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import cases
import decoders
import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import decoder_config
from flax import nnx
from test_contract_flow import earlier_changes
from test_contract_model import assert_same

from sparse_lm.config import ConfigError
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.generate.stream import for_generation
from sparse_lm.models.decoder import build_decoder
from sparse_lm.moe.routers.base import RouterState
from sparse_lm.moe.routers.base_layer import Base
from sparse_lm.moe.routers.expert_choice import ExpertChoice
from sparse_lm.moe.routers.hash import Hash
from sparse_lm.moe.routers.sinkhorn import Sinkhorn
from sparse_lm.sharding import DEFAULT
from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.config import CheckpointConfig, TrainConfig

ROWS = 4  # of a group
ROUTERS: dict[str, Any] = {
    "expert_choice": ExpertChoice(init_scale=cases.ROUTER_SCALE),
    "sinkhorn": Sinkhorn(init_scale=cases.ROUTER_SCALE),
    "base": Base(gain=2.0),
}


def moe(name: str, **options: Any):
    return cases.moe(1, ROUTERS[name], **{"scope": "group", **options})


def by_position(config):
    return config.replace(grouping="position", group_size=ROWS)


def permuted(x_BL):
    """Rows that hold, one after another, the groups by position: [B / R, R, L] -> [B / R, L, R], laid out as [B, L]."""
    batch, length, *rest = x_BL.shape
    x = x_BL.reshape(batch // ROWS, ROWS, length, *rest)
    return np.swapaxes(x, 1, 2).reshape(batch, length, *rest)


def layer_outputs(config, arrays, mesh=None):
    """(y, statistics) of a layer on (x, mask, ids)."""
    with harness.on_mesh(mesh):
        layer = DEFAULT.shard_parameters(harness.build(cases.Case(config)))
        x_BLD, mask_BL, ids_BL = (DEFAULT.constrain(jnp.asarray(a), "BLD"[: a.ndim]) for a in arrays)
        run = jax.jit(lambda layer, *inputs: layer(*inputs))
        return jax.tree.map(np.asarray, run(layer, x_BLD, mask_BL, jax.random.key(0), ids_BL))


@functools.cache
def arrays():
    return (*harness.inputs(), harness.token_ids())


@pytest.mark.parametrize("name", ROUTERS)
def test_positions_are_groups_of_permuted_tokens(name):
    """Grouping by position equals cutting permuted rows into groups of as many neighbours."""
    y_BLD, stats = layer_outputs(by_position(moe(name)), arrays())
    expected_BLD, expected = layer_outputs(moe(name, group_size=ROWS), tuple(permuted(a) for a in arrays()))
    assert harness.deviation(permuted(y_BLD), expected_BLD) < 1e-6
    for one, other in zip(jax.tree.leaves(stats), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    usual_BLD, _ = layer_outputs(moe(name, group_size=ROWS), arrays())
    assert harness.deviation(usual_BLD, y_BLD) > 1e-2


@pytest.mark.parametrize("sizes", [{"data": 2, "expert": 2}, {"fsdp": 2, "expert": 2, "model": 2}], ids=str)
def test_positions_on_a_mesh(sizes, mesh_of):
    """Sixteen rows are four groups of rows, for four devices along the batch: each has all positions of its rows."""
    config = by_position(moe("expert_choice", dispatcher="all_to_all"))
    y_BLD, stats = layer_outputs(config, arrays(), mesh_of(**sizes))
    expected_BLD, expected = layer_outputs(config, arrays())
    assert harness.deviation(y_BLD, expected_BLD) < 1e-5
    for one, other in zip(jax.tree.leaves(stats), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


# Causality


@pytest.mark.parametrize("name", ROUTERS)
def test_groups_of_a_sequence_leak_the_future_in_training(name):
    config = moe(name)
    assert not config.causal
    assert earlier_changes(config, True) > 0


@pytest.mark.parametrize("name", ROUTERS)
def test_groups_by_position_do_not(name):
    config = by_position(moe(name))
    assert config.causal
    assert earlier_changes(config, True) == 0


def test_expert_choice_leaks_in_evaluation_and_by_position_does_not():
    assert earlier_changes(moe("expert_choice"), False) > 0
    assert earlier_changes(by_position(moe("expert_choice")), False) == 0


def test_priorities_that_are_not_causal_are_by_position():
    config = cases.moe(2, priority="probability", scope="group")
    assert not config.causal
    assert by_position(config).causal
    assert earlier_changes(by_position(config), True) == 0


def test_hash_is_causal():
    assert earlier_changes(cases.moe(2, Hash(), priority="token"), True) == 0


# Guards


def experiment(config, **options: Any) -> Experiment:
    return Experiment(model=decoder_config(config), data=DataConfig(length=decoders.LENGTH), **options)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_causal_objective_refuses_the_leak_and_says_what_to_do(name):
    with pytest.raises(ConfigError, match=rf"model\.moe\.router\.kind='{name}'.*not causal.*grouping=position.*allow_"):
        experiment(moe(name))
    assert experiment(moe(name, allow_non_causal=True)).model.moe is not None
    assert experiment(by_position(moe(name))).model.moe is not None


def test_positions_need_rows_and_no_sequence_scope():
    with pytest.raises(ConfigError, match=r"config\.group_size=None.*number of rows"):
        cases.moe(1, grouping="position")
    with pytest.raises(ConfigError, match=r"config\.balance\.scope='sequence'.*use group or global"):
        cases.moe(1, grouping="position", group_size=4, scope="sequence")


def test_rows_of_a_microbatch_have_to_make_whole_groups():
    config = by_position(moe("expert_choice"))
    with pytest.raises(ConfigError, match=r"model\.moe\.group_size=4: cuts a microbatch of 6 rows into 1\.5 groups"):
        experiment(config, train=TrainConfig(batch_size=12, accumulate=2)).mesh_sizes(1)
    with pytest.raises(ConfigError, match="not whole for 2 devices"):
        experiment(config, train=TrainConfig(batch_size=4)).mesh_sizes(2)
    assert experiment(config, train=TrainConfig(batch_size=8)).mesh_sizes(2)["data"] == 2
    x_BLD, mask_BL = (a[:6] for a in harness.inputs())
    with pytest.raises(ValueError, match=r"group_size=4 does not divide the 6 rows.*a multiple of 4 rows"):
        harness.build(cases.Case(config))(jnp.asarray(x_BLD), jnp.asarray(mask_BL))


def test_generation_refuses_routers_that_look_at_other_rows():
    with pytest.raises(ConfigError, match=r"model\.moe=.*ExpertChoice"):
        for_generation(build_decoder(jax.random.key(0), decoder_config(by_position(moe("expert_choice"))), DEFAULT))
    config = by_position(cases.moe(2, scope="group"))
    model = for_generation(build_decoder(jax.random.key(0), decoder_config(config), DEFAULT))
    tokens = jnp.zeros((1, 8), jnp.int32)
    logits, _ = model(tokens, jnp.ones_like(tokens), jnp.arange(8)[None], None)
    assert np.all(np.isfinite(logits))


# Whole models


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        pytest.param(name, positions, marks=() if name == "base" and positions else pytest.mark.slow)
        for name in ("expert_choice", "sinkhorn", "base")
        for positions in (False, True)
    ],
)
def test_training_is_the_same_on_a_mesh(name, positions, mesh_of):
    mesh = mesh_of(data=2, expert=2) if positions else mesh_of(data=2, expert=4)
    config = moe(name, dispatcher="all_to_all")
    config = decoder_config(by_position(config) if positions else config)
    (got,), (expected,) = decoders.train(config, mesh), decoders.train(config, None)
    assert_same(got.metrics, expected.metrics)
    assert_same(got.state, expected.state)


@pytest.mark.parametrize("name", [pytest.param("expert_choice", marks=pytest.mark.slow), "base"])
def test_microbatches_of_whole_groups_add_up(name):
    config = decoder_config(by_position(moe(name, scope="global")))
    assert_same(decoders.gradients(config, 4), decoders.gradients(config, 1))


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "sinkhorn" else pytest.mark.slow) for n in ROUTERS])
def test_scan_and_remat_change_nothing(name):
    config = decoder_config(by_position(moe(name)))
    expected = decoders.gradients(config)
    assert_same(decoders.gradients(dataclasses.replace(config, remat="full", scan_layers=False)), expected)


def test_seeds_of_hashes_differ_by_layer_and_never_change(mesh_of, tmp_path):
    config = decoder_config(cases.moe(2, Hash(), priority="token"))
    model = build_decoder(jax.random.key(0), config, DEFAULT)
    seeds = decoders.flat(nnx.state(model, RouterState))
    (seed_N,) = seeds.values()
    assert len(set(seed_N)) == 2
    for trained in (*decoders.train(config, mesh_of(data=2, expert=4)), *decoders.train(config, None, accumulate=2)):
        (name,) = (name for name in trained.state if "router/seed" in name)
        np.testing.assert_array_equal(trained.state[name], seed_N)
    with Checkpoints(tmp_path / "run", CheckpointConfig(every=1)) as checkpoints:
        checkpoints.save(1, model, {})
        other = jax.eval_shape(lambda key: build_decoder(key, config, DEFAULT), jax.random.key(1))
        restored, _ = checkpoints.restore(other)
    (again_N,) = decoders.flat(nnx.state(restored, RouterState)).values()
    np.testing.assert_array_equal(again_N, seed_N)
