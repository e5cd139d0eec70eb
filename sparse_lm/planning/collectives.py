"""Which collectives a compiled program executes, over which mesh axes, and the bytes that they move."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from sparse_lm.planning.hlo import Execution, Program

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_RAGGED = "ragged-all-to-all"

_LISTS = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\(?([^)]*\)?)\)?)? ?\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same mesh axes in one execution of the program, as one device sees them.

    count: executions. bytes: the sum over them of operand or result, whichever is larger (what an all-gather yields, a
    reduce-scatter takes); of a ragged all-to-all the smaller, what moves at even loads. exact: False when some stand in
    a loop whose number of iterations is not known, which then counts as one, or in a branch, all of which count. axes:
    the mesh axes along which the devices that exchange differ; () where no mesh was given.
    """

    kind: str
    count: int
    bytes: int
    exact: bool = True
    axes: tuple[str, ...] = ()


def collectives(program: Program, mesh: Mapping[str, int] | None = None) -> tuple[Collective, ...]:
    """The collectives that the program executes, by kind (in the order of `KINDS`) and mesh axes (in that of the mesh).

    mesh: sizes of the mesh axes, in order; those of one device among themselves are left out.
    Raises `ValueError` when the groups of a collective cannot be read, or are not of this mesh.
    """
    sums: dict[tuple[str, tuple[str, ...]], Collective] = {}
    pieces: set[tuple[str, str, str]] = set()
    for execution in program.executions():
        instruction = execution.instruction
        kind = _kind(program, execution)
        if kind is None or not execution.times or _is_later_piece(execution, pieces):
            continue
        axes: tuple[str, ...] = ()
        if mesh is not None:
            axes = mesh_axes(replica_groups(instruction.attributes, math.prod(mesh.values())), mesh)
            if not axes:
                continue
        old = sums.get((kind, axes), Collective(kind, 0, 0, True, axes))
        sums[kind, axes] = dataclasses.replace(
            old,
            count=old.count + execution.times,
            bytes=old.bytes + execution.times * _moved(program, execution),
            exact=old.exact and execution.exact,
        )
    names = list(mesh or ())
    order = {kind: place for place, kind in enumerate((*KINDS, _RAGGED))}
    return tuple(
        sorted(sums.values(), key=lambda found: (order[found.kind], [names.index(axis) for axis in found.axes]))
    )


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """The groups of devices that a collective exchanges among: [groups, devices of a group], from its attributes.

    Reads lists `{{0,1},{2,3}}`, ranges `[2,4]<=[4,2]T(1,0)`, named meshes `mesh['a'=2,'b'=4] {'b'}` and the pairs of a
    permutation. No groups are one of all devices. Raises `ValueError` for anything else.
    """
    if (found := _PAIRS.search(attributes)) is not None:
        pairs = np.array([[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([^}]*)\}", found[1])])
        return pairs.reshape(-1, 2)
    if (found := _IOTA.search(attributes)) is not None:
        sizes, source = _numbers(found[1]), _numbers(found[2])
        ids = np.arange(math.prod(source)).reshape(source)
        return (ids.transpose(_numbers(found[3])) if found[3] else ids).reshape(sizes)
    if (found := _NAMED.search(attributes)) is not None:
        return _named_groups(found[1], found[2], found[3])
    if (found := _LISTS.search(attributes)) is not None:
        groups = [_numbers(group) for group in re.findall(r"\{([^}]*)\}", found[1])]
        if len({len(group) for group in groups}) > 1:
            raise ValueError(f"replica_groups={found[1]}: groups of different sizes are not read")
        return np.array(groups) if groups else np.arange(devices)[None]
    if "replica_groups" in attributes:
        raise ValueError(f"{attributes[:200]}: replica_groups of a form that is not read; please report it")
    return np.arange(devices)[None]


def mesh_axes(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ. Devices are numbered in the order of the mesh.

    Raises `ValueError` for a device that the mesh does not have.
    """
    shape = tuple(mesh.values())
    if groups.size and groups.max() >= math.prod(shape):
        raise ValueError(f"a collective names device {groups.max()}, and the mesh {dict(mesh)} has {math.prod(shape)}")
    places = np.stack(np.unravel_index(groups, shape), axis=-1)
    differs = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(axis for axis, differ in zip(mesh, differs, strict=True) if differ)


def _named_groups(sizes: str, device_ids: str | None, names: str) -> np.ndarray:
    """The groups along some axes of a mesh with its own names; an axis `'a':(2)4` is a part of axis a."""
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    total = math.prod(axes.values())
    ids = np.arange(total)
    if device_ids:
        iota = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids)
        if iota is None:
            ids = np.array(_numbers(device_ids.strip("()")))
        else:
            ids = ids.reshape(_numbers(iota[1]))
            ids = ids.transpose(_numbers(iota[2])) if iota[2] else ids
    parts: list[tuple[int, bool]] = []  # (size, whether groups go along it), of axes cut where a group uses a part
    wanted = {name: (int(pre), int(size)) for name, pre, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", names)}
    whole = set(re.findall(r"'([^']+)'(?!:)", names))
    for name, size in axes.items():
        if name in wanted:
            before, used = wanted[name]
            parts += [(before, False), (used, True), (size // (before * used), False)]
        else:
            parts.append((size, name in whole))
    along = [i for i, (_, used) in enumerate(parts) if used]
    others = [i for i, (_, used) in enumerate(parts) if not used]
    shaped = ids.reshape([size for size, _ in parts]).transpose(others + along)
    return shaped.reshape(-1, math.prod(parts[i][0] for i in along))


def _kind(program: Program, execution: Execution) -> str | None:
    """The kind of collective that an instruction is, or None.

    A TPU writes a reduce-scatter as an all-reduce inside of a fusion that keeps a slice of it.
    """
    kind = execution.instruction.opcode.removesuffix("-start")
    if kind == "all-reduce" and execution.computation.startswith("all-reduce-scatter"):
        return "reduce-scatter"
    return kind if kind in KINDS or kind == _RAGGED else None


def _is_later_piece(execution: Execution, pieces: set[tuple[str, str, str]]) -> bool:
    """Whether this is a piece of a collective that was counted before.

    A TPU overlaps a collective with other work by naming it in several fusions of one loop body, as a chain.
    """
    attributes = execution.instruction.attributes
    chain, channel = re.search(r'chain_id="(\d+)"', attributes), re.search(r"channel_id=(\d+)", attributes)
    if chain is None or channel is None:
        return False
    piece = (execution.scope, chain[1], channel[1])
    if piece in pieces:
        return True
    pieces.add(piece)
    return False


def _moved(program: Program, execution: Execution) -> int:
    instruction = execution.instruction
    names = program.by_name[execution.computation]
    taken = sum(names[operand].bytes for operand in instruction.operands if operand in names)
    given = instruction.bytes
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        given -= taken  # the result of a started collective carries its operands along
    if not instruction.opcode.startswith(_RAGGED):
        return max(taken, given)
    # One side holds what devices have at even loads, the other has room for more; other operands say what goes where.
    first = names.get(instruction.operands[0])
    return min(first.bytes, given) if first is not None else given


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
