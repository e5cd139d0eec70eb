"""Meshes: sizes against devices, explicit axes, and how they lie over slices."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparse_lm.mesh import (
    BATCH_AXES,
    MESH_AXES,
    TOKEN_AXES,
    across_slices,
    axis_index,
    make_mesh,
    manual_axis_size,
    max_over,
    mesh_shape,
    on_shards,
    sum_over,
)


def test_tokens_are_cut_over_all_axes_but_those_that_cut_layers_and_widths():
    assert set(MESH_AXES) - set(TOKEN_AXES) == {"stage", "model"}
    assert set(TOKEN_AXES) - set(BATCH_AXES) == {"context"}


@pytest.mark.parametrize(
    ("sizes", "devices", "expected"),
    [
        ({}, 1, (1, 1, 1, 1, 1, 1, 1)),
        ({"data": 8}, 8, (1, 1, 8, 1, 1, 1, 1)),
        ({"data": -1}, 8, (1, 1, 8, 1, 1, 1, 1)),
        ({"model": -1, "data": 2}, 8, (1, 1, 2, 1, 1, 1, 4)),
        ({"data": -1, "fsdp": 2, "expert": 2, "model": 2}, 8, (1, 1, 1, 2, 2, 1, 2)),
        ({"expert": 3, "fsdp": -1}, 6, (1, 1, 1, 2, 3, 1, 1)),
        ({"replica": 2, "context": -1}, 8, (2, 1, 1, 1, 1, 4, 1)),
    ],
)
def test_mesh_shape(sizes, devices, expected):
    assert mesh_shape(sizes, devices) == expected


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        ({"data": 0}, 8, "mesh.data=0: sizes are positive"),
        ({"expert": -2}, 8, "mesh.expert=-2: sizes are positive"),
        ({"data": -1, "model": -1}, 8, "mesh.model=-1: .* only one axis may be -1"),
        ({"data": -1, "model": 3}, 8, "no whole number for mesh.data on 8 devices"),
        ({"data": -1, "model": 16}, 8, "no whole number for mesh.data on 8 devices"),
        ({"data": 4}, 8, "needs 4 devices and there are 8; set one axis to -1 or start with --devices=N"),
        ({"data": 4, "expert": 4}, 8, "needs 16 devices and there are 8"),
        ({}, 8, "needs 1 devices and there are 8"),
        ({"pipe": 8}, 8, "unknown mesh axis 'pipe'; known: replica, stage, data, fsdp, expert, context, model"),
    ],
)
def test_mesh_shape_refuses(sizes, devices, message):
    with pytest.raises(ValueError, match=message):
        mesh_shape(sizes, devices)


def test_make_mesh_is_explicit_and_takes_all_devices():
    mesh = make_mesh({"data": 2, "model": -1})
    assert mesh.axis_names == MESH_AXES
    assert mesh.axis_types == (AxisType.Explicit,) * len(MESH_AXES)
    assert mesh.devices.shape == (1, 1, 2, 1, 1, 1, 4)
    assert set(mesh.devices.flat) == set(jax.devices())


def test_make_mesh_over_some_devices():
    devices = jax.devices()[2:4]
    assert set(make_mesh({"expert": 2}, devices).devices.flat) == set(devices)
    with pytest.raises(ValueError, match="needs 8 devices and there are 2"):
        make_mesh({"data": 8}, devices)


@pytest.mark.parametrize(
    ("shape", "slices", "expected"),
    [
        ((2, 1, 1, 4, 2, 1, 1), 2, (2, 1, 1, 1, 1, 1, 1)),
        ((1, 1, 4, 4, 2, 1, 1), 2, (1, 1, 2, 1, 1, 1, 1)),
        ((2, 1, 2, 4, 1, 1, 2), 4, (2, 1, 2, 1, 1, 1, 1)),
        ((1, 1, 1, 16, 1, 1, 2), 8, (1, 1, 1, 8, 1, 1, 1)),
        ((1, 4, 2, 1, 1, 1, 2), 8, (1, 4, 2, 1, 1, 1, 1)),
    ],
)
def test_the_outermost_axes_cross_slices(shape, slices, expected):
    assert across_slices(shape, slices) == expected


def test_axes_that_move_activations_stay_inside_a_slice():
    with pytest.raises(ValueError, match=r"cannot be laid over 2 slices: .* set mesh.replica=2"):
        across_slices((1, 1, 1, 1, 8, 2, 2), 2)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh reads of a device of a TPU slice."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"


def test_replicas_are_slices(monkeypatch):
    chips = [Chip(4 * s + i, s, (i % 2, i // 2, 0)) for s in range(2) for i in range(4)]
    order = np.random.default_rng(0).permutation(8)  # whatever order they come in
    made = []
    monkeypatch.setattr("sparse_lm.mesh.Mesh", lambda devices, axes, axis_types: made.append(devices))
    make_mesh({"replica": 2, "fsdp": 2, "expert": 2}, [chips[i] for i in order])
    (devices,) = made
    assert devices.shape == (2, 1, 1, 2, 2, 1, 1) and math.prod(devices.shape) == 8
    for number, replica in enumerate(devices):
        assert {chip.slice_index for chip in replica.flat} == {number}


@pytest.mark.parametrize("devices", [1, 2])
def test_shards_have_collectives_where_there_are_several_devices(devices):
    """What is asked inside of `on_shards` holds on one device as well, where there is no `shard_map`."""

    def body(x):
        here = axis_index("data") * manual_axis_size("data")
        most, total = max_over(jnp.max(x), "data"), sum_over(jnp.sum(x), "data")
        return jnp.full_like(x, here) + most + total

    mesh = make_mesh({"data": devices}, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.arange(4.0), NamedSharding(mesh, PartitionSpec("data")))
        run = on_shards(body, PartitionSpec("data"), PartitionSpec("data"))
        np.testing.assert_array_equal(jax.jit(run)(x), 9 + np.array([[0, 0, 0, 0], [0, 0, 2, 2]])[devices - 1])
        assert jax.typeof(run(x)).sharding.spec == PartitionSpec("data")
        assert ("shard_map" in str(jax.make_jaxpr(run)(x))) == (devices > 1)
