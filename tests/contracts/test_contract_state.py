"""What a router holds beside its weights: the same on every mesh and however a batch is cut, stored and read back."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import cases
import decoders
import jax
import numpy as np
import optax
import pytest
from decoders import decoder_config

from sparse_lm.moe.routers.relu import Relu
from sparse_lm.moe.routers.sigmoid import Sigmoid
from sparse_lm.sharding import DEFAULT
from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.config import CheckpointConfig
from sparse_lm.train.state import create_state
from sparse_lm.train.step import make_train_step

TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Stateful:
    """A router with a state. name: of the state."""

    router: Any
    name: str


STATEFUL = {
    "sigmoid": Stateful(Sigmoid(bias_rate=0.05, num_groups=2, groups_kept=1, init_scale=cases.ROUTER_SCALE), "bias_E"),
    "linear": Stateful(Sigmoid(bias_rate=0.05, bias_rule="linear", init_scale=cases.ROUTER_SCALE), "bias_E"),
    "relu": Stateful(Relu(coefficient=0.01, max_active=5, init_scale=cases.ROUTER_SCALE), "coefficient"),
}


def config_of(name: str, **options: Any):
    """Two sparse layers after a dense one, with drops, under one scan."""
    moe = cases.moe(2, STATEFUL[name].router, priority="token", first_dense=1, **options)
    return decoder_config(moe, num_layers=3)


def optimizer_of_decoders() -> optax.GradientTransformation:
    """The one that `decoders.train` takes, so that the compiled programs are the same."""
    return optax.sgd(0.1, momentum=0.9)


@functools.cache
def reference(name: str) -> decoders.Trajectory:
    return decoders.train(config_of(name), None)[0]


def state_of(trajectory: decoders.Trajectory, name: str) -> np.ndarray:
    """The state of all layers, [N, ...]."""
    (value,) = [v for path, v in trajectory.state.items() if path.removesuffix("/value").endswith(STATEFUL[name].name)]
    return value


def assert_same(got: decoders.Trajectory, expected: decoders.Trajectory):
    # The state after two steps: the second one starts from parameters that differ in their last bits already.
    for flat, other, tolerance in (
        (got.metrics, expected.metrics, TOLERANCE),
        (got.state, expected.state, 3 * TOLERANCE),
    ):
        assert flat.keys() == other.keys()
        for path, value in other.items():
            if np.issubdtype(value.dtype, np.floating):
                scale = max(np.max(np.abs(value), initial=0), 1e-30)
                assert np.max(np.abs(flat[path] - value), initial=0) < tolerance * scale, path
            else:
                np.testing.assert_array_equal(flat[path], value, err_msg=path)


def test_after_two_steps_the_bias_follows_from_the_loads():
    """The second step's loads are in the metrics, so that the state before it is known too."""
    trajectory = reference("sigmoid")
    load_NE = trajectory.metrics["parts/stats/router/load_UE"].sum(1)
    assert load_NE.shape == (2, 8)
    last_NE = 0.05 * np.sign(load_NE.mean(1, keepdims=True) - load_NE)
    first_NE = state_of(trajectory, "sigmoid") - last_NE
    np.testing.assert_allclose(np.abs(first_NE), np.where(np.abs(first_NE) > 0.01, 0.05, 0.0), atol=1e-6)
    assert np.any(first_NE != 0)
    assert np.any(first_NE[0] != first_NE[1])  # each layer has its own


def test_after_two_steps_the_coefficient_follows_from_the_loads():
    trajectory = reference("relu")
    router = {name: trajectory.metrics[f"parts/stats/router/{name}"].sum(1) for name in ("load_UE", "tokens_U")}
    excess_N = np.sign(router["load_UE"].sum(-1) - 2 * router["tokens_U"])
    first_N = np.round(np.log(state_of(trajectory, "relu") / 0.01) / np.log(1.2), 4) - excess_N
    assert set(first_N) <= {-1.0, 0.0, 1.0}
    assert np.any(first_N != 0)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        pytest.param("sigmoid", "data2-expert4", marks=pytest.mark.slow),
        ("linear", "fsdp2-expert2-model2"),
        pytest.param("relu", "data2-expert4", marks=pytest.mark.slow),
    ],
)
def test_the_state_is_the_same_on_every_mesh(name, sizes, mesh_of):
    dispatcher = "all_to_all" if sizes == "data2-expert4" else "gather"
    (got,) = decoders.train(config_of(name, dispatcher=dispatcher), mesh_of(**cases.MESHES[sizes]))
    assert_same(got, reference(name))


@pytest.mark.parametrize("name", ["sigmoid", "relu"])
def test_the_state_does_not_depend_on_microbatches(name):
    (got,) = decoders.train(config_of(name), None, accumulate=4)
    assert_same(got, reference(name))


def test_the_state_does_not_depend_on_the_scan():
    (got,) = decoders.train(config_of("sigmoid").replace(scan_layers=False, remat="full"), None)
    assert_same(got, reference("sigmoid"))


@pytest.mark.parametrize("name", ["sigmoid", "relu"])
def test_training_goes_on_from_a_checkpoint_with_the_same_bits(name, tmp_path):
    config, optimizer = config_of(name), optimizer_of_decoders()
    step = make_train_step(optimizer, 1, decoders.DOMAINS)
    create = jax.jit(create_state, static_argnums=(1, 2, 3))
    batch = decoders.placed(decoders.host_batch())
    state, _ = step(create(jax.random.key(0), config, optimizer, DEFAULT), batch, jax.random.key(1))
    with Checkpoints(tmp_path / "run", CheckpointConfig(every=1)) as checkpoints:
        checkpoints.save(1, state, {})
        abstract = jax.eval_shape(lambda: create(jax.random.key(0), config, optimizer, DEFAULT))
        restored, _ = checkpoints.restore(abstract)
    before, after = decoders.flat(state), decoders.flat(restored)
    assert before.keys() == after.keys()
    assert any(path.removesuffix("/value").endswith(STATEFUL[name].name) for path in before)
    restored, _ = step(restored, batch, jax.random.key(1))
    for path, value in decoders.flat(restored).items():
        assert value.tobytes() == reference(name).state[path].tobytes(), path


def test_a_step_that_is_not_finite_leaves_the_state_as_it_was():
    """One token has an infinite embedding."""
    config, optimizer = config_of("sigmoid"), optimizer_of_decoders()
    state = jax.jit(create_state, static_argnums=(1, 2, 3))(jax.random.key(0), config, optimizer, DEFAULT)
    table = state.model.embedding.table_VD
    table[...] = table[...].at[3].set(np.inf)
    batch = decoders.placed(decoders.host_batch())
    state, metrics = make_train_step(optimizer, 1, decoders.DOMAINS)(state, batch, jax.random.key(1))
    assert not bool(metrics.finite)
    for path, value in decoders.flat(state.model).items():
        if path.removesuffix("/value").endswith("bias_E"):
            np.testing.assert_array_equal(value, 0)


def test_the_optimizer_has_nothing_of_the_state():
    paths = [path for path in reference("sigmoid").state if path.removesuffix("/value").endswith("bias_E")]
    assert len(paths) == 1
    assert paths[0].startswith("model/")


def test_the_state_lies_where_the_rules_say(mesh_of):
    """bias_E is stored as every array with an axis E is, and used whole."""
    with jax.set_mesh(mesh_of(data=2, expert=4)):
        create = jax.jit(create_state, static_argnums=(1, 2, 3))
        state = create(jax.random.key(0), config_of("sigmoid"), optimizer_of_decoders(), DEFAULT)
        bias_NE = state.model.stack.units[1].blocks[-1].feed_forward.router.bias_E[...]
        assert bias_NE.shape == (2, 8)
        assert bias_NE.addressable_shards[0].data.shape == (2, 2)
