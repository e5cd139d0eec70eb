"""Adafactor's moments: which there are, what they are called, how they lie on a mesh, and that optax gives the same."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from sparse_lm.experiment import resolved
from sparse_lm.optim.adafactor import FACTOR_FROM, scale_by_adafactor
from sparse_lm.optim.build import build_optimizer
from sparse_lm.optim.config import OptimConfig
from sparse_lm.planning.plan import abstract_state, device_bytes
from sparse_lm.sharding import DEFAULT
from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.config import CheckpointConfig
from sparse_lm.train.state import create_state

F = FACTOR_FROM
SHAPES = {
    "up_EDF": (3, 4, F, 2 * F),  # a stack of layers
    "down_EFD": (4, 2 * F, F),
    "table_VD": (2 * F, F),
    "square_DF": (F, F),
    "query_DHI": (F, 2, F),
    "router_DE": (3, F, 4),
    "scale_D": (F,),
}
MOMENTS = {
    "up_EDF": {"row_ED": (3, 4, F), "column_EF": (3, 4, 2 * F)},
    "down_EFD": {"row_ED": (4, F), "column_EF": (4, 2 * F)},
    "table_VD": {"row_D": (F,), "column_V": (2 * F,)},
    "square_DF": {"row_D": (F,), "column_F": (F,)},
    "query_DHI": {"row_DH": (F, 2), "column_HI": (2, F)},
    "router_DE": {"square_DE": (3, F, 4)},
    "scale_D": {"square_D": (F,)},
}


def tree(seed: int, shapes=SHAPES) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def test_moments_say_their_axes():
    """The mean over the longest axis is called row, that over the next longest column, as optax orders them."""
    state = scale_by_adafactor().init(tree(0))
    found = {name: {key: value.shape for key, value in moments.items()} for name, moments in state.moments.items()}
    assert found == MOMENTS
    assert state.count.shape == ()


@pytest.mark.parametrize("name", ["table_VD", "square_DF", "query_DHI", "down_EFD", "router_DE"])
def test_three_updates_are_those_of_optax(name):
    """Of every matrix by itself; the parameters stay, so that only the moments move."""
    shape = SHAPES[name] if name != "router_DE" else SHAPES[name][1:]
    ours = scale_by_adafactor()
    theirs = optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
    )
    param = tree(0, {name: shape})
    alone = [param[name][e] for e in range(shape[0])] if name == "down_EFD" else [param[name]]
    state, their_states = ours.init(param), [theirs.init(one) for one in alone]
    for seed in range(1, 4):
        grad = tree(seed, {name: shape})
        step, state = jax.jit(ours.update)(grad, state, param)
        for i, one in enumerate(alone):
            own = grad[name][i] if name == "down_EFD" else grad[name]
            expected, their_states[i] = theirs.update(own, their_states[i], one)
            got = step[name][i] if name == "down_EFD" else step[name]
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert int(state.count) == 3


def test_moments_are_cut_like_their_parameters(mesh_of):
    """What is cut of a parameter is cut of its moments, but for the axis that they have lost; also after an update."""
    mesh = mesh_of(fsdp=2, expert=2, model=2)
    optimizer = scale_by_adafactor()
    with jax.set_mesh(mesh):
        params = DEFAULT.shard_parameters(tree(0))
        update = jax.jit(lambda grad, state, params: DEFAULT.shard_parameters(optimizer.update(grad, state, params)[1]))
        for state in (DEFAULT.shard_parameters(optimizer.init(params)), None):
            state = state or update(params, DEFAULT.shard_parameters(optimizer.init(params)), params)
            moments = state.moments
            cut = {
                (name, key): value.size // math.prod(value.sharding.shard_shape(value.shape))
                for name, of_it in moments.items()
                for key, value in of_it.items()
            }
            assert cut["up_EDF", "row_ED"] == 4 and cut["up_EDF", "column_EF"] == 4
            assert cut["table_VD", "row_D"] == 2 and cut["table_VD", "column_V"] == 2
            assert cut["query_DHI", "row_DH"] == 4 and cut["query_DHI", "column_HI"] == 2
            assert cut["router_DE", "square_DE"] == 4


WIDE = {"model__d_model": F, "model__d_ff": F, "model__moe__d_expert": F, "model__num_heads": 2, "model__num_layers": 2}


def experiment(**optim):
    config = tiny.experiment(**WIDE).replace(optim=OptimConfig(warmup_steps=2, **optim))
    return resolved(config, 8)


@pytest.fixture(scope="module")
def bytes_of(mesh_of):
    """Bytes of the optimizer state on one device of a mesh."""

    def measure(sizes, **optim):
        mesh = mesh_of(**sizes)
        with jax.set_mesh(mesh):
            return device_bytes(abstract_state(experiment(**optim), mesh).optimizer)

    return measure


def test_the_plan_shows_what_each_choice_saves(bytes_of):
    """All on one device: adamw holds two numbers per parameter, 8 bytes or 6, lion and sgd 4 or 2."""
    sizes = {"data": 1}
    full, narrow = bytes_of(sizes), bytes_of(sizes, state_dtype="bfloat16")
    assert narrow == pytest.approx(0.75 * full, rel=1e-3)
    for name in ("lion", "sgd"):
        assert bytes_of(sizes, name=name) == pytest.approx(full / 2, rel=1e-3)
        assert bytes_of(sizes, name=name, state_dtype="bfloat16") == pytest.approx(full / 4, rel=1e-3)
    assert bytes_of(sizes, name="adafactor") < full / 5  # narrow heads are not factored


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_state_is_cut_over_the_mesh(bytes_of, name):
    whole, cut = bytes_of({"data": 8}, name=name), bytes_of({"fsdp": 2, "expert": 2, "model": 2}, name=name)
    assert cut < 0.6 * whole


@pytest.mark.parametrize("optim", [{"name": "adafactor"}, {"state_dtype": "bfloat16"}], ids=str)
def test_a_checkpoint_is_restored_on_another_mesh(tmp_path, mesh_of, optim):
    config = experiment(**optim)
    optimizer = build_optimizer(config.optim, 10)
    eight, two = mesh_of(fsdp=2, expert=2, model=2), mesh_of(expert=2)
    every = CheckpointConfig(every=1, keep=1, best=False)
    with jax.set_mesh(eight):
        create = jax.jit(create_state, static_argnums=(1, 2, 3))
        state = create(jax.random.key(0), config.model, optimizer, DEFAULT).optimizer
        # Fresh moments are all zero: give each its own numbers.
        state = jax.tree.map(
            lambda x: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape) % 7, jax.device_get(state)
        )
        state = jax.jit(DEFAULT.shard_parameters)(state)
        with Checkpoints(tmp_path, every) as checkpoints:
            checkpoints.save(1, {"optimizer": state}, {})
    with jax.set_mesh(two), Checkpoints(tmp_path, every) as checkpoints:
        wanted = abstract_state(config, two).optimizer
        restored = checkpoints.restore({"optimizer": wanted})[0]["optimizer"]
    dtypes = set()
    for one, other, want in zip(*map(jax.tree.leaves, (restored, state, wanted)), strict=True):
        assert one.sharding == want.sharding and one.dtype == other.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
        dtypes.add(one.dtype.name)
    assert ("bfloat16" in dtypes) == ("state_dtype" in optim)
