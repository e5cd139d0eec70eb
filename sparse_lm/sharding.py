"""One table that says where every logical axis lives on the device mesh; nothing else spells a PartitionSpec.

The mesh and its axes: `sparse_lm.mesh`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparse_lm.dims import LETTERS
from sparse_lm.mesh import BATCH_AXES, MESH_AXES, TOKEN_AXES, explicit_mesh, manual_axis_size, on_shards
from sparse_lm.products import einsum

Axes = str | tuple[str, ...] | None
STORED = "DPQ"  # where storage cuts: the model's width, else (in latent attention) that of the latents


@dataclasses.dataclass(frozen=True)
class Rules:
    """Maps logical axes (letters of `sparse_lm.dims`) to mesh axes, for activations, parameters and optimizer state.

    A pair is (letter, mesh axis or axes). Letters that are absent are not cut.

    activations: of what a layer computes. parameters: of weights while they are used (experts, tensor parallelism).
    stored: mesh axes that cut a weight only until it is used, when they are all-gathered (FSDP); along the first of
    the letters in `STORED` that the weight has. dense: the same, of weights without E alone. state: further such axes,
    by which optimizer state alone is cut (ZeRO). Named values: `sparse_lm.rules`.

    Raises `ValueError` on an unknown letter or mesh axis, and when one array would use a mesh axis twice.
    """

    activations: tuple[tuple[str, Axes], ...]
    parameters: tuple[tuple[str, Axes], ...]
    stored: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    state: tuple[str, ...] = ()

    def __post_init__(self):
        tables = (*self.activations, *self.parameters)
        for letter, _ in tables:
            if letter not in LETTERS:
                raise ValueError(f"sharding rule for unknown axis {letter!r}; known: {', '.join(LETTERS)}")
        for name, axes in (*tables, ("stored", self.stored), ("dense", self.dense), ("state", self.state)):
            if unknown := set(_as_tuple(axes)) - set(MESH_AXES):
                raise ValueError(f"sharding rule {name!r} -> unknown mesh axis {min(unknown)!r}; known: {MESH_AXES}")

    @property
    def for_state(self) -> Rules:
        """The rules of optimizer state, whose leaves are named as the parameters' are."""
        return dataclasses.replace(self, stored=(*self.stored, *self.state), state=())

    def act(self, letters: str, shape: Sequence[int] | None = None) -> PartitionSpec:
        """The partition of an activation with these axes; `.` stands for an axis that is never cut.

        shape: with it L stays whole where the mesh does not divide it, as that of a single new token.
        """
        spec = _spec(letters, dict(self.activations))
        if shape is None or "L" not in letters:
            return spec
        mesh, place = jax.sharding.get_abstract_mesh(), letters.index("L")
        whole = not mesh.empty and shape[place] % _ways(mesh, spec[place])
        return PartitionSpec(*spec[:place], None, *spec[place + 1 :]) if whole else spec

    def ways(self, letter: str, size: int) -> int | None:
        """Into how many parts activations are cut along an axis of this size; None where that is not even."""
        parts = _ways(jax.sharding.get_abstract_mesh(), self.act(letter)[0]) if explicit_mesh() else 1
        return None if size % parts else parts

    def param(self, letters: str) -> PartitionSpec:
        """The partition of a stored parameter with these axes."""
        table = dict(self.parameters)
        place = next((letter for letter in STORED if letter in letters), None)
        if place is not None:
            stored = self.stored if "E" in letters else (*self.stored, *self.dense)
            table[place] = (*_as_tuple(table.get(place)), *stored)
        return _spec(letters, table)

    def gathered(self, letters: str) -> PartitionSpec:
        """The partition of a parameter while it is used: the cuts of storage undone, the others kept."""
        return _spec(letters, dict(self.parameters))

    def gather(self, weight: jax.Array, letters: str, dtype=None) -> jax.Array:
        """A stored parameter made ready for use: cast to `dtype`, then all-gathered over the axes of storage.

        The gradient takes the way back: reduce-scattered over them. Casting first halves the bytes for bf16.
        """
        return _reshard(weight if dtype is None else weight.astype(dtype), self.gathered(letters))

    def whole(self, weight: jax.Array, dtype=None) -> jax.Array:
        """A stored parameter cast to `dtype` and present in full on every device."""
        return _reshard(weight if dtype is None else weight.astype(dtype), PartitionSpec(*(None,) * weight.ndim))

    def constrain(self, x: jax.Array, letters: str) -> jax.Array:
        """The same values, laid out as an activation with these axes (moves data if they were laid out otherwise)."""
        return _reshard(x, self.act(letters, x.shape))

    def einsum(self, subscripts: str, *operands: jax.Array, dtype=None) -> jax.Array:
        """`jnp.einsum` whose subscripts are logical axes; the result is laid out as an activation with its axes.

        A contraction over a cut axis (heads or hidden width under tensor parallelism) is summed over the mesh here.
        Inside a `shard_map` it is the plain einsum over the local shards. dtype: of the sums and the result; None is
        that of the operands.
        """
        out = None
        if explicit_mesh():
            inputs, letters = subscripts.split("->")
            pairs = zip(inputs.split(","), operands, strict=True)
            sizes = {axis: size for axes, x in pairs for axis, size in zip(axes, x.shape, strict=True)}
            out = self.act(letters, [sizes[letter] for letter in letters])
        return einsum(subscripts, *operands, out_sharding=out, dtype=dtype)

    def reshape(self, x: jax.Array, shape: tuple[int, ...], letters: str) -> jax.Array:
        """`jnp.reshape` to an activation with these axes."""
        return jnp.reshape(x, shape, out_sharding=self.act(letters, shape) if explicit_mesh() else None)

    def take_rows(self, table: jax.Array, rows: jax.Array, letters: str) -> jax.Array:
        """`table[rows]` of a table that every device holds whole, as an activation with axes `letters`."""
        if not explicit_mesh():
            return table[rows]
        spec = self.act(letters, (*rows.shape, *table.shape[1:]))
        places = PartitionSpec(*spec[: rows.ndim])
        take = on_shards(lambda table, rows: table[rows], (PartitionSpec(), places), spec)
        return take(_reshard(table, PartitionSpec(*(None,) * table.ndim)), _reshard(rows, places))

    def draw(self, sampler: Callable, key: jax.Array, shape: tuple[int, ...], letters: str) -> jax.Array:
        """`sampler(key, shape)` of `jax.random` with these axes: the same numbers on any mesh, each device its part."""
        return sampler(key, shape, out_sharding=self.act(letters, shape)) if explicit_mesh() else sampler(key, shape)

    def parameter_specs(self, tree, mesh=None):
        """The partition of every leaf of a tree of parameters, or of anything shaped and named like them.

        A leaf is recognised by its name: `up_EDF` has axes E, D, F, and one more N in front when layers are stacked.
        A leaf without such a name (a step counter, a factored statistic of another rank) is not cut.
        mesh: the partition on that one, whole along axes that it cannot cut evenly; what would cut E there cuts F.
        """

        def spec(path, leaf):
            letters = letters_of(path, leaf.ndim)
            if letters is None:
                return PartitionSpec()
            if mesh is None or mesh.empty:
                return self.param(letters)
            return _even(_hidden_for_experts(self.param(letters), letters, leaf, mesh), leaf, mesh)

        return jax.tree_util.tree_map_with_path(spec, tree)

    def shard_parameters(self, tree):
        """Every leaf of the tree laid out as `parameter_specs` says for the mesh that is set."""
        return jax.tree.map(_reshard, tree, self.parameter_specs(tree, jax.sharding.get_abstract_mesh()))

    def per_device(self, body: Callable, parameters, activations, replicated, checked: bool = True):
        """`body(parameters, activations, replicated)` on every device's own shards: the one `shard_map` of a model.

        parameters: a tree named as `parameter_specs` expects, passed as stored. activations: arrays cut along their
        first axis, as G is; so are the results. replicated: arrays that every device holds whole, or None. checked:
        False for kernels that cannot declare which of their results differ between devices.
        Without a mesh it is a plain call.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return body(parameters, activations, replicated)
        first = self.act("G")
        parameters = self.shard_parameters(parameters)
        specs = (self.parameter_specs(parameters, mesh), first, PartitionSpec())
        return on_shards(body, specs, first, checked)(parameters, activations, replicated)

    def per_group(self, body: Callable, *arrays: jax.Array, axis: str = "G"):
        """`body(*arrays)` on every device's own groups: for sorts and loops along S, which are not typed on cut arrays.

        arrays, and the results, are cut along their first axis alone, which is `axis`: G, or B for whole rows. Without
        a mesh it is a plain call.
        """
        if not explicit_mesh():
            return body(*arrays)
        first = self.act(axis)
        arrays = tuple(self.constrain(x, axis + "." * (x.ndim - 1)) for x in arrays)
        return on_shards(body, first, first)(*arrays)

    def per_shard(self, body: Callable, arrays: Sequence[jax.Array], letters: Sequence[str], out: str):
        """`body(*arrays)` on every device's own shards of activations with these axes; the result has the axes `out`.

        What is not cut along a mesh axis has to come out equal on its devices. Without a mesh it is a plain call.
        """
        if not explicit_mesh():
            return body(*arrays)
        arrays = tuple(self.constrain(x, axes) for x, axes in zip(arrays, letters, strict=True))
        specs = tuple(self.act(axes) for axes in letters)
        return on_shards(body, specs, self.act(out))(*arrays)

    def per_stage(self, body: Callable, own, shared):
        """`body(own, shared)` on every stage of a pipeline; other mesh axes stay explicit in it, and arrays cut along.

        own: a tree whose arrays, and those of the results, are cut along their first axis over `stage`. shared: a tree
        that every stage has whole. Nothing else may be used inside. What differs between stages is not declared
        (`check_vma`), since jax 0.10 loses count of it in the gradient of a `shard_map` inside of another.
        """
        specs = (PartitionSpec("stage"), PartitionSpec())
        run = jax.shard_map(body, in_specs=specs, out_specs=specs[0], axis_names={"stage"}, check_vma=False)
        return run(staged(own), staged(shared, cut=False))

    def gather_shards(self, tree, keep: tuple[str, ...] = (), dtype=None, specs=None):
        """For use inside a `shard_map`: parameters all-gathered over all axes but `model` and those in `keep`.

        specs: how they are stored, from `parameter_specs` outside; None is as the table says for every mesh.
        Here the gradient's reduce-scatter is explicit: it is the transpose of the tiled all-gather.
        """

        def gather(leaf, spec):
            leaf = leaf if dtype is None else leaf.astype(dtype)
            for dim, cut in enumerate(spec):
                for axis in reversed(_as_tuple(cut)):
                    if axis not in (*keep, "model") and manual_axis_size(axis) > 1:
                        leaf = jax.lax.all_gather(leaf, axis, axis=dim, tiled=True)
            return leaf

        return jax.tree.map(gather, tree, self.parameter_specs(tree) if specs is None else specs)


def letters_of(path, ndim: int) -> str | None:
    """The logical axes that a parameter's attribute name declares after its last underscore, or None.

    path: a key path of `jax.tree_util`, or the name itself. Stacked layers have one axis more: N.
    """
    names = path if isinstance(path, str) else jax.tree_util.keystr(path, simple=True, separator="/")
    name = names.removesuffix("/value").rsplit("/", 1)[-1]
    letters = name.rsplit("_", 1)[-1] if "_" in name else ""
    if not letters or any(letter not in LETTERS for letter in letters):
        return None
    return {len(letters): letters, len(letters) + 1: "N" + letters}.get(ndim)


def staged(tree, cut: bool = True):
    """The same arrays with their first axis cut over `stage`, or no longer cut over it; their other cuts stay."""

    def laid_out(x: jax.Array) -> jax.Array:
        if x.ndim == 0 or not explicit_mesh():
            return x
        first, *others = jax.typeof(x).sharding.spec
        whole = "stage" not in _as_tuple(first)
        return x if whole and not cut else _reshard(x, PartitionSpec("stage" if cut else None, *others))

    return jax.tree.map(laid_out, tree)


def lead_like(x: jax.Array, like: jax.Array, axes: int) -> jax.Array:
    """`x` with its first `axes` axes laid out as those of `like`, which `jax.vmap` over both asks for.

    The rest stays as it is, where the mesh axes are free for it. A scalar stays as it is.
    """
    if x.ndim == 0 or not explicit_mesh():
        return x
    lead = jax.typeof(like).sharding.spec[:axes]
    taken = {axis for cut in lead for axis in _as_tuple(cut)}
    rest = (None if taken & set(_as_tuple(cut)) else cut for cut in jax.typeof(x).sharding.spec[axes:])
    return _reshard(x, PartitionSpec(*lead, *rest))


def _reshard(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.sharding.reshard(x, spec) if explicit_mesh() else x


def _as_tuple(axes: Axes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def _even(spec: PartitionSpec, leaf, mesh) -> PartitionSpec:
    """With as many mesh axes of each cut as divide it evenly: a router with free experts may stay whole along E.

    A single stage leaves no trace: a scan over layers wants them whole.
    """

    def prefix(size: int, cut: Axes) -> Axes:
        axes = tuple(axis for axis in _as_tuple(cut) if axis != "stage" or mesh.shape[axis] > 1)
        return next((axes[:n] for n in range(len(axes), 0, -1) if size % _ways(mesh, axes[:n]) == 0), None)

    return PartitionSpec(*(prefix(size, cut) for size, cut in zip(leaf.shape, spec, strict=False)))


def _hidden_for_experts(spec: PartitionSpec, letters: str, leaf, mesh) -> PartitionSpec:
    """With F cut further by what does not divide E, where that is even: every device has a part of all experts."""
    expert, hidden, entries = letters.find("E"), letters.find("F"), list(spec)
    if min(expert, hidden) < 0:
        return spec
    both = (*_as_tuple(spec[hidden]), *_as_tuple(spec[expert]))
    if leaf.shape[expert] % _ways(mesh, spec[expert]) == 0 or leaf.shape[hidden] % _ways(mesh, both):
        return spec
    entries[expert], entries[hidden] = None, both
    return PartitionSpec(*entries)


def _ways(mesh, axes: Axes) -> int:
    """Into how many parts these mesh axes cut."""
    return math.prod(mesh.shape[axis] for axis in _as_tuple(axes))


def _spec(letters: str, table: Mapping[str, Axes]) -> PartitionSpec:
    seen: set[str] = set()
    entries: list[Axes] = []
    for letter in letters:
        if letter != "." and letter not in LETTERS:
            raise ValueError(f"unknown axis {letter!r} in {letters!r}; known: {', '.join(LETTERS)} and '.'")
        axes = _as_tuple(table.get(letter))
        if seen & set(axes):
            raise ValueError(
                f"{letters!r} would use mesh axis {sorted(seen & set(axes))} twice; change the rules table"
            )
        seen |= set(axes)
        entries.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    return PartitionSpec(*entries)


DEFAULT = Rules(
    activations=(
        ("B", BATCH_AXES),
        ("L", "context"),
        ("G", TOKEN_AXES),
        ("U", TOKEN_AXES),
        *((letter, "model") for letter in "FHJV"),
    ),
    parameters=(
        ("N", "stage"),
        ("E", "expert"),
        *((letter, "model") for letter in "FHJV"),
    ),
    stored=("fsdp",),
)


def put(mesh: Mesh, rules: Rules, x: np.ndarray, letters: str) -> jax.Array:
    """A host array that every process holds whole, placed on the mesh as an activation with these axes."""
    sharding = NamedSharding(mesh, rules.act(letters))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def abstract_sharded(tree, rules: Rules, mesh: Mesh):
    """`jax.ShapeDtypeStruct`s of a tree of parameters (or of anything named like them), laid out by the rules."""

    def shaped(leaf, spec):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(shaped, tree, rules.parameter_specs(tree, mesh))
