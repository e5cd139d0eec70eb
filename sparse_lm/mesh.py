"""The device mesh: its axes, their sizes, how they lie over slices, and what code may ask of the one in use.

A mesh has seven axes, each possibly of size 1:

- `replica`: like `data`, over slices or nodes that only a slow network joins;
- `stage`: layers are cut into groups, through which microbatches flow (pipeline parallelism);
- `data`: copies of the parameters, each on its own sequences;
- `fsdp`: like `data`, with the parameters and the optimizer state cut along D;
- `expert`: like `data` for everything but the experts, which are cut along E;
- `context`: every sequence is cut along L; attention gathers keys and values;
- `model`: tensor parallelism (heads, hidden width, vocabulary).

All axes are explicit (`jax.sharding.AxisType.Explicit`): a sharding is part of an array's type, is checked while
tracing, and `jax.typeof(x)` shows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

MESH_AXES = ("replica", "stage", "data", "fsdp", "expert", "context", "model")
BATCH_AXES = ("replica", "data", "fsdp", "expert")
TOKEN_AXES = (*BATCH_AXES, "context")
_EXPLICIT = (AxisType.Explicit,) * len(MESH_AXES)
_RENAMED = hasattr(jax.typeof(0), "manual_axis_type")  # what differs between devices, `vma` before jax 0.10


def mesh_shape(sizes: Mapping[str, int], num_devices: int) -> tuple[int, ...]:
    """Resolves mesh sizes against the number of devices; one size may be -1 and takes what is left.

    Raises `ValueError` naming the axis when the sizes cannot tile the devices.
    """
    unknown = sorted(sizes.keys() - set(MESH_AXES))
    if unknown:
        raise ValueError(f"unknown mesh axis {unknown[0]!r}; known: {', '.join(MESH_AXES)}")
    shape = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
    free = [axis for axis, size in shape.items() if size == -1]
    bad = [axis for axis, size in shape.items() if size != -1 and size < 1]
    if bad or len(free) > 1:
        axis = bad[0] if bad else free[1]
        raise ValueError(f"mesh.{axis}={shape[axis]}: sizes are positive, and only one axis may be -1 (what is left)")
    fixed = math.prod(size for size in shape.values() if size != -1)
    if free:
        if num_devices % fixed:
            raise ValueError(f"mesh {shape} leaves no whole number for mesh.{free[0]} on {num_devices} devices")
        shape[free[0]] = num_devices // fixed
    elif fixed != num_devices:
        raise ValueError(
            f"mesh {shape} needs {fixed} devices and there are {num_devices}; "
            "set one axis to -1 or start with --devices=N for N virtual CPU devices"
        )
    return tuple(shape.values())


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """An explicit mesh over `devices` (default: all), axes in the order of `MESH_AXES`.

    Devices of several slices (TPU slices joined by a data centre's network) are laid out so that the outermost axes,
    `replica` first, cross slices and the others stay inside one. Raises `ValueError` when the sizes do not allow that.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(sizes, len(devices))
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices == 1:
        return jax.make_mesh(shape, MESH_AXES, axis_types=_EXPLICIT, devices=devices)
    outer = across_slices(shape, slices)
    inner = tuple(size // out for size, out in zip(shape, outer, strict=True))
    return Mesh(mesh_utils.create_hybrid_device_mesh(inner, outer, devices), MESH_AXES, axis_types=_EXPLICIT)


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of no devices, with these sizes of the axes, all of which are named in order."""
    return AbstractMesh(tuple(sizes.values()), MESH_AXES, axis_types=_EXPLICIT)


def across_slices(shape: Sequence[int], slices: int) -> tuple[int, ...]:
    """How much of each mesh axis crosses slices: `replica` takes all it can, then `stage`, `data` and `fsdp`.

    Raises `ValueError` when these axes do not hold a factor of the number of slices: the others move activations in
    every layer, which a slow network must not carry. Stages move those of one layer in many, and to a neighbour.
    """
    outer, left = [1] * len(MESH_AXES), slices
    for place, axis in enumerate(MESH_AXES):
        if axis in ("replica", "stage", "data", "fsdp"):
            outer[place] = math.gcd(shape[place], left)
            left //= outer[place]
    if left > 1:
        raise ValueError(
            f"mesh {dict(zip(MESH_AXES, shape, strict=True))} cannot be laid over {slices} slices: a multiple of that "
            f"has to be in replica x stage x data x fsdp; set mesh.replica={slices}"
        )
    return tuple(outer)


def explicit_mesh() -> bool:
    """Whether a mesh is set and arrays carry shardings; False in plain use without a mesh and inside a `shard_map`.

    On a stage of a pipeline they do: all axes but `stage` are explicit there.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and any(kind == AxisType.Explicit for kind in mesh.axis_types)


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: what the mesh in use consists of, or what a program without a mesh would run on.

    A mesh of devices that are not here, as for compilation ahead of time, counts.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def on_shards(body: Callable, in_specs, out_specs, checked: bool = True) -> Callable:
    """`body` on every device's own shards: `jax.shard_map` over the mesh that is set.

    On one device there are no shards, and no `shard_map`: in it, gradients of weights would be sums over one device,
    which XLA for CPU makes. The functions below know. checked: `check_vma`, whether what differs between devices is
    declared.
    """
    if jax.sharding.get_abstract_mesh().size == 1:
        return jax.sharding.auto_axes(body, out_sharding=out_specs)
    return jax.shard_map(body, in_specs=in_specs, out_specs=out_specs, check_vma=checked)


def _shards() -> bool:
    """Whether this is inside of a `shard_map`."""
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types


def manual_axis_size(axis: str) -> int:
    """Size of a mesh axis inside a `shard_map`; 1 where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[axis]


def axis_index(axis: str) -> jax.Array | int:
    """This device's place along a mesh axis inside a `shard_map`; 0 elsewhere."""
    return jax.lax.axis_index(axis) if _shards() else 0


def sum_over(x: jax.Array, axis: str) -> jax.Array:
    """Inside a `shard_map`: the sum of the devices' values along a mesh axis; `x` itself elsewhere."""
    return jax.lax.psum(x, axis) if _shards() else x


def max_over(x: jax.Array, axis: str) -> jax.Array:
    """Inside a `shard_map`: the largest of the devices' values along a mesh axis; `x` itself elsewhere."""
    return jax.lax.pmax(x, axis) if _shards() else x


def varying(x: jax.Array) -> jax.Array:
    """Inside a `shard_map`: `x` declared to differ on every device; what enters a custom gradient has to be.

    Not between stages: a `shard_map` inside of a pipeline works on one.
    """
    if not _shards():
        return x
    mesh, aval = jax.sharding.get_abstract_mesh(), jax.typeof(x)
    known = aval.manual_axis_type.varying if _RENAMED else aval.vma
    missing = tuple(axis for axis in mesh.axis_names if axis not in known and axis != "stage")
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def shape_like(x: jax.Array, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """What a Pallas call returns, declared to differ between devices as `x` does."""
    name = "manual_axis_type" if _RENAMED else "vma"
    return jax.ShapeDtypeStruct(shape, dtype, **{name: getattr(jax.typeof(x), name)})
