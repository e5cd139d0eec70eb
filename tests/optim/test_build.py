"""Optimizers against formulas in numpy, and on a mesh against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from sparse_lm.optim.adafactor import FACTOR_FROM
from sparse_lm.optim.build import apply, build_optimizer
from sparse_lm.optim.config import OptimConfig
from sparse_lm.optim.groups import letters
from sparse_lm.optim.schedules import schedule
from sparse_lm.sharding import DEFAULT

NAMES = ("adamw", "lion", "sgd", "adafactor")
SHAPES = {
    "table_VD": (256, 128),
    "up_EDF": (3, 4, 128, 256),
    "query_DHI": (3, 128, 4, 16),
    "router_DE": (3, 128, 4),
    "bias_EF": (3, 4, 256),
    "scale_D": (3, 128),
}


def _tree(seed, shapes=SHAPES, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def _run(config, params, grads, steps=3):
    optimizer = build_optimizer(config, 10)
    state = jax.jit(optimizer.init)(params)
    step = jax.jit(lambda grads, state, params: apply(optimizer, grads, state, params))
    for _ in range(steps):
        params, state = step(grads, state, params)
    return params, state


def _one(config, param, grad, name="up_DF"):
    params, _ = _run(config, {name: jnp.asarray(param)}, {name: jnp.asarray(grad)}, steps=1)
    return np.asarray(params[name])


PARAM = np.array([[1.0, -2.0], [0.5, 4.0]], np.float32)
GRAD = np.array([[0.1, -0.2], [0.3, 0.0]], np.float32)
PLAIN = {"warmup_steps": 0, "schedule": "constant", "clip": None}


def test_adamw_two_updates():
    config = OptimConfig(learning_rate=0.1, weight_decay=0.5, beta1=0.8, beta2=0.9, eps=1e-3, **PLAIN)
    got, _ = _run(config, {"up_DF": jnp.asarray(PARAM)}, {"up_DF": jnp.asarray(GRAD)}, steps=2)
    param = PARAM.astype(np.float64)
    mean, square = np.zeros_like(param), np.zeros_like(param)
    for t in (1, 2):
        mean, square = 0.8 * mean + 0.2 * GRAD, 0.9 * square + 0.1 * GRAD**2
        step = (mean / (1 - 0.8**t)) / (np.sqrt(square / (1 - 0.9**t)) + 1e-3)
        param = param - 0.1 * (step + 0.5 * param)
    np.testing.assert_allclose(got["up_DF"], param, rtol=2e-6)


def test_lion_two_updates():
    config = OptimConfig(name="lion", learning_rate=0.1, weight_decay=0.5, beta1=0.8, beta2=0.9, **PLAIN)
    got, _ = _run(config, {"up_DF": jnp.asarray(PARAM)}, {"up_DF": jnp.asarray(GRAD)}, steps=2)
    param, mean = PARAM.astype(np.float64), np.zeros_like(PARAM)
    for _ in range(2):
        step = np.sign(0.8 * mean + 0.2 * GRAD)
        mean = 0.9 * mean + 0.1 * GRAD
        param = param - 0.1 * (step + 0.5 * param)
    np.testing.assert_allclose(got["up_DF"], param, rtol=2e-6)


def test_sgd_two_updates():
    config = OptimConfig(name="sgd", learning_rate=0.1, weight_decay=0.5, beta1=0.8, **PLAIN)
    got, _ = _run(config, {"up_DF": jnp.asarray(PARAM)}, {"up_DF": jnp.asarray(GRAD)}, steps=2)
    param, momentum = PARAM.astype(np.float64), np.zeros_like(PARAM)
    for _ in range(2):
        momentum = 0.8 * momentum + GRAD
        param = param - 0.1 * (momentum + 0.5 * param)
    np.testing.assert_allclose(got["up_DF"], param, rtol=2e-6)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_a_narrow_first_moment_is_rounded_once_per_update_and_nothing_else_is(name):
    """The first update does not see the stored moment at all; after it, the state is that of float32, rounded."""
    params, grads = _tree(0), _tree(1)
    results = []
    for dtype in ("float32", "bfloat16"):
        config = OptimConfig(name=name, learning_rate=0.01, warmup_steps=0, schedule="constant", state_dtype=dtype)
        results.append(_run(config, params, grads, steps=1))
    (full, full_state), (narrow, narrow_state) = results
    for key, array in full.items():
        if name == "sgd":  # optax rounds its momentum before it is used
            np.testing.assert_allclose(narrow[key] - params[key], array - params[key], rtol=2**-7, atol=1e-6)
        else:
            np.testing.assert_array_equal(narrow[key], array, err_msg=key)
    dtypes = set()
    for one, other in zip(jax.tree.leaves(narrow_state), jax.tree.leaves(full_state), strict=True):
        np.testing.assert_array_equal(one, other.astype(one.dtype))
        dtypes.add(one.dtype.name)
    assert dtypes == {"bfloat16", "int32"} | ({"float32"} if name == "adamw" else set())


def _adafactor_first_update(param, grad):
    """Algorithm 4 of the paper at t = 1, where the decay 1 - t^-0.8 is 0; factored over both axes."""
    square = grad.astype(np.float64) ** 2
    row, column = square.mean(axis=1, keepdims=True), square.mean(axis=0, keepdims=True)
    update = grad / np.sqrt(row * column / square.mean())
    update = update / max(1.0, np.sqrt((update**2).mean()))
    return update * max(1e-3, np.sqrt((param.astype(np.float64) ** 2).mean()))


def test_adafactor_is_factored_clipped_and_relative_to_the_parameter():
    rng = np.random.default_rng(1)
    param = 3 * rng.normal(size=(FACTOR_FROM, FACTOR_FROM + 8)).astype(np.float32)
    grad = rng.normal(size=param.shape).astype(np.float32) ** 3
    config = OptimConfig(name="adafactor", learning_rate=0.01, weight_decay=0.5, **PLAIN)
    expected = param - 0.01 * (_adafactor_first_update(param, grad) + 0.5 * param)
    np.testing.assert_allclose(_one(config, param, grad), expected, rtol=1e-4, atol=1e-5)


def test_adafactor_treats_every_expert_of_every_layer_as_its_own_matrix():
    # More experts than D: factoring the two longest axes would mix experts. Scales differ by expert and layer.
    rng = np.random.default_rng(2)
    shape = (2, FACTOR_FROM + 16, FACTOR_FROM, FACTOR_FROM)
    scale = 10.0 ** rng.uniform(-2, 2, size=(*shape[:2], 1, 1))
    param, grad = ((scale * rng.normal(size=shape)).astype(np.float32) for _ in range(2))
    config = OptimConfig(name="adafactor", learning_rate=0.01, weight_decay=0.0, **PLAIN)
    got = _one(config, param, grad, "up_EDF")
    for layer, expert in [(0, 0), (1, 7), (1, shape[1] - 1)]:
        expected = 0.01 * _adafactor_first_update(param[layer, expert], grad[layer, expert])
        np.testing.assert_allclose(param[layer, expert] - got[layer, expert], expected, atol=2e-4 * expected.std())


def test_adafactor_state_is_smaller_than_the_parameters():
    params = _tree(0)
    _, state = _run(OptimConfig(name="adafactor", warmup_steps=1), params, _tree(1), steps=1)
    floats = sum(leaf.size for leaf in jax.tree.leaves(state))
    factored = 256 + 128 + 3 * 4 * (128 + 256)
    whole = sum(params[name].size for name in ("query_DHI", "router_DE", "bias_EF", "scale_D"))
    assert factored + whole <= floats < factored + whole + 100 < params["up_EDF"].size / 5


@pytest.mark.parametrize("name", NAMES)
def test_only_matrices_decay_and_by_the_rate_times_the_decay(name):
    # A zero gradient leaves nothing but the decay.
    params = _tree(0)
    config = OptimConfig(name=name, learning_rate=0.1, weight_decay=0.5, warmup_steps=2, schedule="constant")
    got, _ = _run(config, params, jax.tree.map(jnp.zeros_like, params), steps=2)
    kept = (1 - 0.05 * 0.5) * (1 - 0.1 * 0.5)  # the rates are 0.05 and 0.1
    for key, param in params.items():
        factor = kept if key in ("up_EDF", "query_DHI") else 1.0
        np.testing.assert_allclose(got[key], factor * param, rtol=1e-5, err_msg=key)


def test_gradients_are_clipped_by_their_global_norm():
    # Adam forgets a gradient's scale unless eps is large: with eps = 1, a step is g / (|g| + 1).
    grads = {"up_DF": jnp.full((1, 1), 6.0), "scale_D": jnp.full((1,), 8.0)}  # global norm 10
    params = jax.tree.map(jnp.zeros_like, grads)
    base = {"learning_rate": 1.0, "weight_decay": 0.0, "eps": 1.0, "warmup_steps": 0, "schedule": "constant"}
    clipped, _ = _run(OptimConfig(clip=1.0, **base), params, grads, steps=1)
    assert float(clipped["up_DF"][0, 0]) == pytest.approx(-0.6 / 1.6)
    assert float(clipped["scale_D"][0]) == pytest.approx(-0.8 / 1.8)
    for clip in (None, 11.0):
        free, _ = _run(OptimConfig(clip=clip, **base), params, grads, steps=1)
        assert float(free["up_DF"][0, 0]) == pytest.approx(-6 / 7)


def test_follows_the_schedule():
    # Lion's steps are exactly the rate: the parameter is minus the sum of the rates.
    config = OptimConfig(name="lion", learning_rate=0.1, weight_decay=0.0, warmup_steps=3, schedule="cosine")
    params = {"up_DF": jnp.zeros((1, 1))}
    got, _ = _run(config, params, {"up_DF": jnp.ones((1, 1))}, steps=7)
    expected = sum(np.asarray(schedule(config, 10)(count)).item() for count in range(7))
    assert float(got["up_DF"][0, 0]) == pytest.approx(-expected, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_state_is_float32_and_parameters_keep_their_type(name):
    params, grads = _tree(0, dtype=jnp.bfloat16), _tree(1, dtype=jnp.bfloat16)
    got, state = _run(OptimConfig(name=name, warmup_steps=1), params, grads)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}


@pytest.mark.parametrize("name", NAMES)
def test_flax_state_gives_the_same_as_a_dictionary(name):
    class Model(nnx.Module):
        def __init__(self, arrays):
            for key, array in arrays.items():
                setattr(self, key, nnx.Param(array))

    config = OptimConfig(name=name, warmup_steps=1)
    params, grads = (nnx.split(Model(_tree(seed)), nnx.Param, ...)[1] for seed in (0, 1))
    got, _ = _run(config, params, grads)
    expected, _ = _run(config, _tree(0), _tree(1))
    for key, array in expected.items():
        np.testing.assert_array_equal(np.asarray(got[key]), array, err_msg=key)


def _sharded(mesh, tree):
    def place(path, array):
        axes = letters(path)
        return jax.device_put(array, NamedSharding(mesh, DEFAULT.param("N" * (array.ndim - len(axes)) + axes)))

    return jax.tree_util.tree_map_with_path(place, tree)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "expert": 2}, {"fsdp": 2, "expert": 2, "model": 2}])
def test_a_mesh_changes_nothing(mesh_of, name, sizes):
    mesh = mesh_of(**sizes)
    config = OptimConfig(name=name, warmup_steps=2, learning_rate=0.01)
    expected, expected_state = _run(config, _tree(0), _tree(1))
    with jax.set_mesh(mesh):
        params = _sharded(mesh, _tree(0))
        got, state = _run(config, params, _sharded(mesh, _tree(1)))
    for key, array in expected.items():
        np.testing.assert_allclose(got[key], array, atol=1e-6, err_msg=key)
        assert got[key].sharding == params[key].sharding, key
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state, expected_state)
    for leaf in jax.tree.leaves(state):
        if leaf.shape[:2] == (3, 4):
            assert "expert" in str(leaf.sharding.spec)


def test_a_parameter_without_axes_is_refused():
    with pytest.raises(ValueError, match=r"parameter 'kernel' does not say its axes"):
        build_optimizer(OptimConfig(warmup_steps=1), 10).init({"kernel": jnp.zeros((2, 2))})
