"""Sharding inside a `shard_map`: the same code on every mesh and on none gives the same values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sparse_lm.mesh import MESH_AXES, axis_index, manual_axis_size, max_over, sum_over, varying
from sparse_lm.sharding import DEFAULT, Rules

MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"expert": 8},
    {"model": 8},
    {"data": 2, "fsdp": 2, "model": 2},
    {"fsdp": 2, "expert": 2, "model": 2},
]
each_mesh = pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "-".join(f"{k}{v}" for k, v in sizes.items()))


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def mlp(parameters, x_GD, scale):
    used = DEFAULT.gather_shards(parameters)
    hidden_GF = jnp.square(x_GD @ used["up_DF"])
    return sum_over(hidden_GF @ used["down_FD"], "model") * scale


@each_mesh
def test_per_device_equals_the_plain_call(mesh_of, sizes):
    parameters = {"up_DF": normal(0, 8, 16), "down_FD": normal(1, 16, 8)}
    x_GD, scale = normal(2, 8, 8), jnp.asarray(0.5)

    def loss(parameters, x_GD):
        return jnp.square(DEFAULT.per_device(mlp, parameters, x_GD, scale)).mean()

    value, gradients = jax.value_and_grad(loss, (0, 1))(parameters, x_GD)
    hidden = np.square(np.asarray(x_GD) @ np.asarray(parameters["up_DF"]))
    np.testing.assert_allclose(value, np.square(hidden @ np.asarray(parameters["down_FD"]) * 0.5).mean(), rtol=1e-5)
    with jax.set_mesh(mesh_of(**sizes)):
        stored = DEFAULT.shard_parameters(parameters)
        got, got_gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(stored, DEFAULT.constrain(x_GD, "GD"))
        assert jax.typeof(got_gradients[0]["up_DF"]).sharding.spec == P("fsdp", "model")
        np.testing.assert_allclose(got, value, rtol=1e-5)
        for one, other in zip(jax.tree.leaves(got_gradients), jax.tree.leaves(gradients), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)


def test_gather_shards_gathers_a_double_cut_in_order_and_casts(mesh_of):
    rules = Rules(activations=(("G", "data"),), parameters=(("D", ("fsdp", "expert")),))
    weight = normal(0, 8)
    seen = []

    def body(parameters, x_G, _):
        whole = rules.gather_shards(parameters, dtype=jnp.bfloat16)["scale_D"]
        part = rules.gather_shards(parameters, keep=("fsdp",))["scale_D"]
        seen.append((whole.shape, whole.dtype, part.shape, part.dtype))
        return x_G + jax.lax.pmean(jnp.sum(whole.astype(jnp.float32) * jnp.arange(8.0)), ("fsdp", "expert"))

    with jax.set_mesh(mesh_of(data=2, fsdp=2, expert=2)):
        out = rules.per_device(body, {"scale_D": weight}, rules.constrain(jnp.zeros(4), "G"), None)
    rounded = np.asarray(weight.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(out, np.full(4, rounded @ np.arange(8.0)), rtol=1e-5)
    assert seen[-1] == ((8,), jnp.bfloat16, (4,), jnp.float32)


def test_helpers_inside_a_shard_map(mesh_of):
    def body(x):
        place = axis_index("data")
        total = sum_over(x, "data")
        assert manual_axis_size("data") == 4
        assert manual_axis_size("expert") == 2
        everywhere = varying(jnp.ones(2))
        assert varying(everywhere) is everywhere
        return total, x * 0 + place, everywhere

    with jax.set_mesh(mesh_of(data=4, expert=2)):
        x = jax.sharding.reshard(jnp.arange(4.0), P("data"))
        specs = (P(), P("data"), P(tuple(axis for axis in MESH_AXES if axis != "stage")))
        total, place, everywhere = jax.shard_map(body, in_specs=P("data"), out_specs=specs)(x)
    np.testing.assert_array_equal(total, [6.0])
    np.testing.assert_array_equal(place, [0, 1, 2, 3])
    assert everywhere.shape == (16,)


def test_helpers_without_a_mesh():
    x = jnp.arange(3)
    assert manual_axis_size("data") == 1
    assert axis_index("model") == 0
    assert sum_over(x, "data") is x
    assert max_over(x, "data") is x
    assert varying(x) is x
    assert DEFAULT.gather_shards({"up_DF": x})["up_DF"] is x


@pytest.mark.parametrize("sizes", [{"data": 2, "expert": 4}, {"fsdp": 2, "expert": 2, "model": 2}])
def test_per_group_sorts_groups_where_they_lie(mesh_of, sizes):
    x_GS, other_GS = normal(0, 8, 5), normal(1, 8, 5)

    def body(x_GS, other_GS):
        order_GS = jnp.argsort(x_GS, axis=1)
        return jnp.take_along_axis(other_GS, order_GS, axis=1), jnp.cumsum(x_GS, axis=1)

    expected = DEFAULT.per_group(body, x_GS, other_GS)
    np.testing.assert_array_equal(expected[0][3], np.asarray(other_GS)[3][np.argsort(np.asarray(x_GS)[3])])
    with jax.set_mesh(mesh_of(**sizes)):
        arrays = [DEFAULT.constrain(x, "GS") for x in (x_GS, other_GS)]
        got = jax.jit(lambda *arrays: DEFAULT.per_group(body, *arrays))(*arrays)
        assert jax.typeof(got[0]).sharding.spec[0] == jax.typeof(arrays[0]).sharding.spec[0]
    for one, two in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


@pytest.mark.parametrize("sizes", [{"data": 2, "model": 4}, {"fsdp": 2, "expert": 2, "model": 2}])
def test_per_shard_sees_every_axis_cut_and_gives_each_group_its_result(mesh_of, sizes):
    """The largest of each row of a product with a table that is cut along V."""
    x_BD, table_VD = normal(0, 8, 6), normal(1, 16, 6)
    seen = []

    def body(x_BD, table_VD):
        seen.append((x_BD.shape[0], table_VD.shape[0]))
        return max_over(jnp.max(x_BD @ table_VD.T, axis=1), "model")

    expected = DEFAULT.per_shard(body, (x_BD, table_VD), ("BD", "VD"), "B")
    np.testing.assert_allclose(expected, (np.asarray(x_BD) @ np.asarray(table_VD).T).max(1), rtol=1e-5)
    with jax.set_mesh(mesh_of(**sizes)):
        arrays = DEFAULT.constrain(x_BD, "BD"), DEFAULT.constrain(table_VD, "VD")
        got = jax.jit(lambda *arrays: DEFAULT.per_shard(body, arrays, ("BD", "VD"), "B"))(*arrays)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert seen == [(8, 16), (8 // (8 // sizes["model"]), 16 // sizes["model"])]
