"""Which collectives a compiled program executes, read from the text of its HLO.

A program is a call graph of computations. A collective inside a loop counts once per iteration, where the compiler
wrote the number of iterations beside the loop; where it did not, the loop counts as one and the result says so.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([\w\-]+)(?=\()")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation|"
    r"branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind in one execution of the program, as one device sees them.

    count: executions. bytes: the sum over them of operand or result, whichever is larger (what an all-gather yields, a
    reduce-scatter takes). exact: False when some stand in a loop whose number of iterations is not known, which then
    counts as one, or in a branch, all of which count.
    """

    kind: str
    count: int
    bytes: int
    exact: bool = True

    def plus(self, other: Collective, times: int, exact: bool) -> Collective:
        """This, and `times` times what one more computation does."""
        return Collective(
            self.kind,
            self.count + times * other.count,
            self.bytes + times * other.bytes,
            self.exact and (exact or not other.count) and other.exact,
        )


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


def collectives(hlo: str) -> tuple[Collective, ...]:
    """The kinds of collectives that the program executes, in the order of `KINDS`; kinds without one are left out.

    hlo: the text of a compiled program (`compiled.as_text()`). Raises `ValueError` when it has no entry computation.
    """
    computations, entry = _parse(hlo)
    if entry is None:
        raise ValueError("the text has no ENTRY computation: pass the text of a compiled program")
    known: dict[str, dict[str, Collective]] = {}

    def total(name: str) -> dict[str, Collective]:
        if name not in known:
            known[name] = _total(computations[name])
        return known[name]

    def _total(instructions: list[_Instruction]) -> dict[str, Collective]:
        sums = {kind: Collective(kind, 0, 0) for kind in KINDS}
        sizes = {instruction.name: _bytes(instruction.type) for instruction in instructions}
        for instruction in instructions:
            kind = instruction.opcode.removesuffix("-start")
            if kind in sums:
                sums[kind] = sums[kind].plus(Collective(kind, 1, _moved(instruction, sizes)), 1, True)
                continue
            for called, times, exact in _calls(instruction):
                inner = total(called) if called in computations else {}
                sums |= {kind: sums[kind].plus(inner[kind], times, exact) for kind in inner}
        return sums

    return tuple(found for found in total(entry).values() if found.count)


def _calls(instruction: _Instruction) -> Iterator[tuple[str, int, bool]]:
    """(computation, how often it runs, whether that is known) of what an instruction calls."""
    if instruction.opcode in ("async-update", "async-done"):  # their async-start has counted it
        return
    times, exact = 1, instruction.opcode != "conditional"
    if instruction.opcode == "while":
        trips = _TRIPS.search(instruction.attributes)
        times, exact = (int(trips[1]), True) if trips else (1, False)
    for match in _CALLED.finditer(instruction.attributes):
        for name in match[1].strip("{}").split(","):
            yield name.strip().removeprefix("%"), times, exact


def _moved(instruction: _Instruction, sizes: dict[str, int]) -> int:
    taken = sum(sizes.get(operand, 0) for operand in instruction.operands)
    given = _bytes(instruction.type)
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        given -= taken  # the result of a started collective carries its operands along
    return max(taken, given)


def _parse(hlo: str) -> tuple[dict[str, list[_Instruction]], str | None]:
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
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
    return computations, entry


def _instruction(line: str) -> _Instruction | None:
    """`%name = type opcode(operands), attributes`, or None for any other line."""
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
    return _Instruction(start[1], rest[:end], opcode[1], operands, arguments[closing:])


def _closing(text: str) -> int:
    """The index behind the parenthesis that closes the one that `text` begins with."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return index + 1
    return len(text)


def _bytes(type_text: str) -> int:
    """Bytes of an array type such as `f32[8,16]{1,0}`, or of all arrays in a tuple of them."""
    total = 0
    for dtype, shape in _ARRAY.findall(type_text):
        width = re.search(r"\d+", dtype)
        bits = 8 if dtype == "pred" else int(width[0]) if width else 0  # a token has no size
        total += math.ceil(bits * math.prod(int(size.lstrip("<=")) for size in shape.split(",") if size) / 8)
    return total
