"""One table that says where every logical axis lives on the device mesh, and the only place that spells a PartitionSpec.

A mesh has four axes, each possibly of size 1:

- `data`: copies of the parameters, each on its own sequences;
- `fsdp`: like `data`, with the parameters and the optimizer state cut along D;
- `expert`: like `data` for everything but the experts, which are cut along E;
- `model`: tensor parallelism (heads, hidden width, vocabulary).

All axes are explicit (`jax.sharding.AxisType.Explicit`): a sharding is part of an array's type, is checked while
tracing, and `jax.typeof(x)` shows it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sparse_lm.dims import LETTERS

MESH_AXES = ("data", "fsdp", "expert", "model")
BATCH_AXES = ("data", "fsdp", "expert")

Axes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Rules:
    """Maps logical axes (letters of `sparse_lm.dims`) to mesh axes, for activations and for stored parameters.

    A pair is (letter, mesh axis or axes). Letters that are absent are not cut. Raises `ValueError` on an unknown
    letter or mesh axis, and when one array would use a mesh axis twice.
    """

    activations: tuple[tuple[str, Axes], ...]
    parameters: tuple[tuple[str, Axes], ...]

    def __post_init__(self):
        for letter, axes in (*self.activations, *self.parameters):
            if letter not in LETTERS:
                raise ValueError(f"sharding rule for unknown axis {letter!r}; known: {', '.join(LETTERS)}")
            for axis in _as_tuple(axes):
                if axis not in MESH_AXES:
                    raise ValueError(f"sharding rule {letter!r} -> unknown mesh axis {axis!r}; known: {MESH_AXES}")

    def act(self, letters: str) -> PartitionSpec:
        """The partition of an activation with these axes; `.` stands for an axis that is never cut."""
        return _spec(letters, dict(self.activations))

    def param(self, letters: str) -> PartitionSpec:
        """The partition of a stored parameter with these axes."""
        return _spec(letters, dict(self.parameters))

    def gathered(self, letters: str) -> PartitionSpec:
        """The partition of a parameter while it is used: FSDP cuts undone, the others kept."""
        kept = {letter: tuple(a for a in _as_tuple(axes) if a != "fsdp") for letter, axes in self.parameters}
        return _spec(letters, kept)

    def gather(self, weight: jax.Array, letters: str, dtype=None) -> jax.Array:
        """A stored parameter made ready for use: cast to `dtype`, then all-gathered over `fsdp`.

        The gradient takes the way back: reduce-scattered over `fsdp`. Casting first halves the bytes for bf16.
        """
        return jax.sharding.reshard(weight if dtype is None else weight.astype(dtype), self.gathered(letters))

    def constrain(self, x: jax.Array, letters: str) -> jax.Array:
        """The same values, laid out as an activation with these axes (moves data if they were laid out otherwise)."""
        return jax.sharding.reshard(x, self.act(letters))


def _as_tuple(axes: Axes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def _spec(letters: str, table: dict[str, Axes]) -> PartitionSpec:
    seen: set[str] = set()
    entries: list[Axes] = []
    for letter in letters:
        if letter != "." and letter not in LETTERS:
            raise ValueError(f"unknown axis {letter!r} in {letters!r}; known: {', '.join(LETTERS)} and '.'")
        axes = _as_tuple(table.get(letter))
        if seen & set(axes):
            raise ValueError(f"{letters!r} would use mesh axis {sorted(seen & set(axes))} twice; change the rules table")
        seen |= set(axes)
        entries.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    return PartitionSpec(*entries)


DEFAULT = Rules(
    activations=(
        ("B", BATCH_AXES),
        ("G", BATCH_AXES),
        ("U", BATCH_AXES),
        ("F", "model"),
        ("H", "model"),
        ("J", "model"),
        ("V", "model"),
    ),
    parameters=(
        ("D", "fsdp"),
        ("E", "expert"),
        ("F", "model"),
        ("H", "model"),
        ("J", "model"),
        ("V", "model"),
    ),
)


def mesh_shape(sizes: dict[str, int], num_devices: int) -> tuple[int, ...]:
    """Resolves mesh sizes against the number of devices; one size may be -1 and takes what is left.

    Raises `ValueError` naming the axis when the sizes cannot tile the devices.
    """
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


def make_mesh(sizes: dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """An explicit mesh over `devices` (default: all), axes in the order of `MESH_AXES`."""
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(sizes, len(devices))
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES), devices=devices)


def put(mesh: Mesh, rules: Rules, x: np.ndarray, letters: str) -> jax.Array:
    """A host array that every process holds whole, placed on the mesh as an activation with these axes."""
    sharding = NamedSharding(mesh, rules.act(letters))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
