"""The text of a compiled program (HLO), read into instructions with how often each of them runs.

A program is a call graph of computations. What stands in a loop runs once per iteration: the compiler writes their
number beside the loop (CPU, GPU), or it is read from the loop's condition (TPU). Where neither is known, the loop
counts as one iteration and what is in it is marked as not exact. A loop over what even loads leave empty counts as
none.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([\w\-]+)(?=\()")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([\d,]*)(?::((?:[A-Z]+\([^()]*\)|\([^()]*\))*))?\})?")
_TILE = re.compile(r"T\((\d+(?:,\d+)*)\)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation|"
    r"branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"')
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """`bf16[8,128]{1,0:T(8,128)(2,1)S(1)}`: element type, shape, and what the layout says.

    minor_to_major: order of the dimensions in memory, () where the text has none. tile: of the outermost tiling.
    space: memory space; 0 is the device's main memory, on a TPU 1 is its on-chip memory.
    """

    dtype: str
    shape: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def bits(self) -> int:
        """Bits of one element; a token has none."""
        width = re.search(r"\d+", self.dtype)
        return 8 if self.dtype == "pred" else int(width[0]) if width else 0

    @property
    def bytes(self) -> int:
        """Bytes of the elements, without padding."""
        return math.ceil(self.bits * math.prod(self.shape) / 8)

    @property
    def padded_bytes(self) -> int:
        """Bytes in memory, where the last dimensions of the layout fill whole tiles."""
        shape = list(self.shape)
        for dim, size in zip(self.minor_to_major, reversed(self.tile), strict=False):
            shape[dim] = math.ceil(shape[dim] / size) * size
        return math.ceil(self.bits * math.prod(shape) / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`%name = type opcode(operands), attributes`. arguments: the text between the parentheses."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool = False

    @functools.cached_property
    def arrays(self) -> tuple[ArrayType, ...]:
        """The array, or the arrays of the tuple, that the instruction yields."""
        return array_types(self.type)

    @property
    def bytes(self) -> int:
        """Bytes of what it yields."""
        return sum(array.bytes for array in self.arrays)

    @property
    def op_name(self) -> str:
        """The way through the traced program to the operation that it came from; empty where it has none."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Execution:
    """An instruction where it is executed. times: how often. exact: whether that is known.

    computation: where it stands. scope: that, or, of what is inside of fusions, where the outermost one stands.
    """

    instruction: Instruction
    computation: str
    scope: str
    times: int
    exact: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a program by name, and the one that it begins with.

    idle: a name scope whose loops do not run, None where all do.
    """

    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    idle: str | None = None

    @functools.cached_property
    def by_name(self) -> dict[str, dict[str, Instruction]]:
        """The instructions of every computation by their names."""
        return {name: {i.name: i for i in body} for name, body in self.computations.items()}

    def executions(self) -> Iterator[Execution]:
        """Every instruction at every place that the program calls it from; all branches of a conditional count."""
        yield from self._within(self.entry, self.entry, 1, True)

    def _within(self, name: str, scope: str, times: int, exact: bool) -> Iterator[Execution]:
        for instruction in self.computations.get(name, ()):
            yield Execution(instruction, name, scope, times, exact)
            inside = instruction.opcode == "fusion"
            for called, more, known in self.calls(instruction, name):
                yield from self._within(called, scope if inside else called, times * more, exact and known)

    def calls(self, instruction: Instruction, computation: str = "") -> Iterator[tuple[str, int, bool]]:
        """(computation, how often it runs, whether that is known) of what an instruction of a computation calls."""
        if instruction.opcode in ("async-update", "async-done"):  # their async-start has counted it
            return
        times, exact = 1, instruction.opcode != "conditional"
        if instruction.opcode == "while":
            trips = self.trips(instruction, computation)
            times, exact = (1, False) if trips is None else (trips, True)
        for match in _CALLED.finditer(instruction.attributes):
            for name in match[1].strip("{}").split(","):
                yield name.strip().removeprefix("%"), times, exact

    def trips(self, loop: Instruction, computation: str) -> int | None:
        """Iterations of a `while` of a computation, or None where they are not known.

        What the compiler noted; else from the bound that the condition compares a counter with, where the counter
        begins at a constant and the body adds a constant to it.
        """
        if self.idle is not None and self.idle in loop.op_name:
            return 0
        noted = _TRIPS.search(loop.attributes)
        if noted:
            return int(noted[1])
        condition, body = _CONDITION.search(loop.attributes), _BODY.search(loop.attributes)
        if not condition or not body or condition[1] not in self.computations or body[1] not in self.computations:
            return None
        compared = self._compared(condition[1])
        if compared is None:
            return None
        index, bound, direction = compared
        start, step = self._start(loop, computation, index), self._step(body[1], index)
        if start is None or step is None or step <= 0:
            return None
        return max(0, math.ceil((bound + (direction == "LE") - start) / step))

    def _start(self, loop: Instruction, computation: str, index: int) -> int | None:
        """The constant that an element of the loop's tuple begins with."""
        names = self.by_name.get(computation, {})
        first = names.get(loop.operands[0]) if loop.operands else None
        if first is None or first.opcode != "tuple" or index >= len(first.operands):
            return None
        return _constant(_copied(names.get(first.operands[index]), names))

    def _compared(self, condition: str) -> tuple[int, int, str] | None:
        """(which element of the loop's tuple, bound, direction) of a condition `element < constant`."""
        names = self.by_name[condition]
        root = next((i for i in self.computations[condition] if i.root), None)
        while root is not None and root.opcode == "fusion":  # a wrapped comparison: the same operands, one level up
            called = next((name for name, *_ in self.calls(root)), "")
            inner = next((i for i in self.computations.get(called, ()) if i.root), None)
            if inner is None or inner.opcode != "compare":
                return None
            root = dataclasses.replace(inner, operands=root.operands)
        if root is None or root.opcode != "compare" or len(root.operands) != 2:
            return None
        direction = re.search(r"direction=(\w+)", root.attributes)
        left, right = (names.get(operand) for operand in root.operands)
        index, bound = _tuple_index(left), _constant(right)
        if direction is None or direction[1] not in ("LT", "LE") or index is None or bound is None:
            return None
        return index, bound, direction[1]

    def _step(self, body: str, index: int) -> int | None:
        """The constant that the body adds to an element of the loop's tuple."""
        names = self.by_name[body]
        root = next((i for i in self.computations[body] if i.root), None)
        if root is None or root.opcode != "tuple" or index >= len(root.operands):
            return None
        new = _copied(names.get(root.operands[index]), names)
        if new is None:
            return None
        if new.opcode == "fusion":
            constants = [_constant(names.get(operand)) for operand in new.operands]
            inside = [i for name, *_ in self.calls(new) for i in self.computations.get(name, ())]
            constants += [_constant(i) for i in inside]
            found = [value for value in constants if value is not None]
            return found[0] if len(found) == 1 and any(i.opcode == "add" for i in inside) else None
        if new.opcode != "add":
            return None
        found = [value for operand in new.operands if (value := _constant(names.get(operand))) is not None]
        return found[0] if len(found) == 1 else None


def parse(hlo: str, idle: str | None = None) -> Program:
    """Reads the text of a compiled program (`compiled.as_text()`). idle: see `Program`.

    Raises `ValueError` when it has no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    entry = None
    for line in hlo.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
            continue
        instruction = _instruction(line)
        if instruction is not None:
            current.append(instruction)
    if entry is None:
        raise ValueError("the text has no ENTRY computation: pass the text of a compiled program")
    return Program({name: tuple(body) for name, body in computations.items()}, entry, idle)


def array_types(text: str) -> tuple[ArrayType, ...]:
    """The types of the arrays in the text of a type, which may be a tuple."""
    found = []
    for dtype, shape, order, layout in _ARRAY.findall(text):
        tile, space = _TILE.search(layout or ""), re.search(r"S\((\d+)\)", layout or "")
        found.append(
            ArrayType(
                dtype,
                tuple(int(size.lstrip("<=")) for size in shape.split(",") if size),
                tuple(int(dim) for dim in order.split(",") if dim),
                tuple(int(size) for size in tile[1].split(",")) if tile else (),
                int(space[1]) if space else 0,
            )
        )
    return tuple(found)


def _copied(instruction: Instruction | None, names: dict[str, Instruction]) -> Instruction | None:
    """What an instruction is a copy of."""
    while instruction is not None and instruction.opcode in ("copy", "bitcast"):
        instruction = names.get(instruction.operands[0])
    return instruction


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    value = instruction.arguments.strip("() ")
    return int(value) if re.fullmatch(r"-?\d+", value) else None


def _tuple_index(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    found = re.search(r"index=(\d+)", instruction.attributes)
    return int(found[1]) if found else None


def _instruction(line: str) -> Instruction | None:
    """The instruction of a line, or None for any other line."""
    start = _INSTRUCTION.match(line)
    if start is None:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[start.end() :])
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    opcode = _OPCODE.match(rest, end)
    if end < 0 or opcode is None:
        return None
    arguments = rest[opcode.end() :]
    closing = _closing(arguments)
    operands = tuple(_OPERAND.findall(arguments[:closing]))
    return Instruction(
        start[2], rest[:end], opcode[1], operands, arguments[:closing], arguments[closing:], bool(start[1])
    )


def _closing(text: str) -> int:
    """The index behind the parenthesis that closes the one that `text` begins with."""
    depth = 0
    for index, letter in enumerate(text):
        if letter == "(":
            depth += 1
        elif letter == ")":
            depth -= 1
            if depth == 0:
                return index + 1
    return len(text)
