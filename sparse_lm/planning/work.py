"""What one device computes in an execution of a compiled program: FLOPs, bytes of main memory, its largest arrays.

Only matrix products and convolutions count FLOPs, two per multiplication and addition; a multiplication by the padding
of a convolution is none. A TPU writes products as convolutions, of which a batched one pads with zeros.
"""

from __future__ import annotations

import dataclasses
import math
import re

from sparse_lm.planning.hlo import ArrayType, Execution, Instruction, Program

_CONTRACTING = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_GROUPED = re.compile(r"jit\(t?gmm\)")  # the kernels of megablox, which tell FLOPs of all rows and compute those in use
_COST = re.compile(r'"cost_estimate":\s*\{[^}]*?"flops":\s*"?(\d+)')
# Neither computes nor moves anything that the instructions around it do not count.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
}
_LATER = ("-done", "-update")  # the second half of something that was counted when it started
_PREFETCH = ("copy-start", "slice-start")  # a TPU moves an array, or a part, between main and on-chip memory


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one device and one execution of the program.

    flops: of matrix products. memory_bytes: read from and written to main memory, as if every fusion read its operands
    and wrote its result once; slices count their own size. unknown: kernels (targets of custom calls) that do
    not tell their FLOPs, which then count 0. exact: False when some of it stands in a loop of unknown length, which
    counts as one, or in a branch, all of which count.
    """

    flops: int
    memory_bytes: int
    unknown: tuple[str, ...] = ()
    exact: bool = True


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array in main memory that the program makes. source: the operation in the traced program. times: how often.

    bytes: with the padding of its layout.
    """

    bytes: int
    type: str
    opcode: str
    source: str
    times: int


def work(program: Program, filled: float = 1.0) -> Work:
    """The work of a program; see `Work`. Raises `ValueError` for a convolution whose attributes cannot be read.

    filled: the share of rows that are in use in grouped products whose kernels pass over the others.
    """
    flops, moved, unknown, exact = 0, 0, set(), True
    fused = _fused(program)
    for execution in program.executions():
        instruction = execution.instruction
        count = _flops(program, execution)
        if instruction.opcode == "custom-call" and count is None and _is_kernel(instruction):
            target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
            unknown.add(target[1] if target else instruction.name)
        share = filled if instruction.opcode == "custom-call" and _GROUPED.search(instruction.op_name) else 1.0
        flops += int(execution.times * (count or 0) * share)
        exact = exact and (execution.exact or not count)
        if execution.computation not in fused:
            moved += int(execution.times * _memory(program, execution, share))
    return Work(flops, moved, tuple(sorted(unknown)), exact)


def largest(program: Program, count: int) -> tuple[Buffer, ...]:
    """The largest arrays in main memory that the program makes, equal ones of one operation once; parameters are none.

    They need not be alive at the same time.
    """
    fused, found = _fused(program), {}
    for execution in program.executions():
        instruction = execution.instruction
        if execution.computation in fused or instruction.opcode in (*_FREE, *_PREFETCH):
            continue
        if instruction.opcode.endswith(_LATER):
            continue
        for array in instruction.arrays:
            if array.space:
                continue
            source = instruction.op_name or instruction.name
            key = (_shown(array), source)
            times = found[key].times if key in found else 0
            found[key] = Buffer(array.padded_bytes, key[0], instruction.opcode, source, times + execution.times)
    return tuple(sorted(found.values(), key=lambda buffer: -buffer.bytes)[:count])


def _shown(array: ArrayType) -> str:
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def _fused(program: Program) -> set[str]:
    """Computations whose instructions never stand in main memory: the insides of fusions, reductions and the like."""
    names = set()
    for body in program.computations.values():
        for instruction in body:
            if instruction.opcode not in ("while", "conditional", "call", "async-start"):
                names |= {name for name, *_ in program.calls(instruction)}
    return names


def _is_kernel(instruction: Instruction) -> bool:
    return "tpu_custom_call" in instruction.attributes or "__triton" in instruction.attributes


def _flops(program: Program, execution: Execution) -> int | None:
    """FLOPs of one execution of an instruction by itself, or None where it does not tell."""
    instruction = execution.instruction
    if instruction.opcode == "dot":
        left = _operand(program, execution, 0)
        found = _CONTRACTING.search(instruction.attributes)
        contracted = [left.shape[int(dim)] for dim in found[1].split(",") if dim] if found and left else []
        return 2 * math.prod(instruction.arrays[0].shape) * math.prod(contracted)
    if instruction.opcode == "convolution":
        left, right = (_operand(program, execution, i) for i in (0, 1))
        if left is None or right is None:
            return None
        return convolution_flops(instruction, left.shape, right.shape)
    if instruction.opcode == "custom-call":
        told = _COST.search(instruction.attributes)
        return int(told[1]) if told else None
    return None


def convolution_flops(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """FLOPs of a convolution of operands with these shapes; multiplications by padding or dilation's zeros are none.

    Raises `ValueError` when its attributes cannot be read.
    """
    labels = _LABELS.search(instruction.attributes)
    if labels is None:
        raise ValueError(f"{instruction.name}: a convolution without dim_labels: {instruction.attributes[:200]}")
    inputs, kernel, output = labels.groups()
    result, window = instruction.arrays[0].shape, _window(instruction.attributes)
    batch, features = result[output.index("b")], result[output.index("f")]
    # The kernel's input features, and the result's batch, are already those of one group.
    positions = 1
    for place, dim in enumerate(sorted(letter for letter in kernel if letter.isdigit())):
        sizes = (left[inputs.index(dim)], right[kernel.index(dim)], result[output.index(dim)])
        positions *= _pairs(*sizes, {name: values[place] for name, values in window.items() if place < len(values)})
    return 2 * batch * features * right[kernel.index("i")] * positions


def _pairs(size: int, kernel: int, output: int, window: dict[str, tuple[int, ...]]) -> int:
    """Along one dimension: how many (output place, kernel place) meet an element of the input."""
    stride, dilate, spread = (window.get(name, (1,))[0] for name in ("stride", "lhs_dilate", "rhs_dilate"))
    low = window.get("pad", (0, 0))[0]
    if kernel == 1 and stride == 1 and dilate == 1 and low == 0:
        return min(output, size)
    count = 0
    for k in range(kernel):
        # Places o with 0 <= o * stride + k * spread - low <= (size - 1) * dilate, and a multiple of the dilation.
        first, last = k * spread - low, (size - 1) * dilate
        period = dilate // math.gcd(stride, dilate)
        starts = [o for o in range(min(period, output)) if (o * stride + first) % dilate == 0]
        for start in starts:
            lowest = max(start, math.ceil(-first / stride))
            lowest += (start - lowest) % period
            highest = min(output - 1, (last - first) // stride)
            count += max(0, (highest - lowest) // period + 1)
    return count


def _window(attributes: str) -> dict[str, tuple[tuple[int, ...], ...]]:
    """`window={size=1x4 pad=0_0x3_3}` as the values of each name per dimension."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    if found is None:
        return {}
    pairs = (part.split("=") for part in found[1].split())
    return {name: tuple(tuple(int(n) for n in dim.split("_")) for dim in text.split("x")) for name, text in pairs}


def _operand(program: Program, execution: Execution, place: int) -> ArrayType | None:
    names = program.by_name[execution.computation]
    operands = execution.instruction.operands
    found = names.get(operands[place]) if place < len(operands) else None
    return found.arrays[0] if found is not None and found.arrays else None


def _memory(program: Program, execution: Execution, rows: float) -> float:
    """Bytes that one execution of an instruction reads from and writes to main memory.

    rows: the share of matrices that it touches; in a grouped product those are the rows, and weights have three axes.
    """
    instruction, names = execution.instruction, program.by_name[execution.computation]
    if instruction.opcode in _FREE or instruction.opcode.endswith(_LATER):
        return 0
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _main(instruction)
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        update = names.get(instruction.operands[-1 if instruction.opcode == "scatter" else 1])
        return 2 * (_main(update) if update is not None else 0)
    if instruction.opcode in _PREFETCH:
        return min((array.bytes for array in instruction.arrays if array.shape), default=0)
    written = _main(instruction, rows)
    read = [_main(names[operand], rows) if operand in names else 0 for operand in instruction.operands]
    if instruction.opcode == "fusion":
        written, read = _sliced(program, instruction, written, read)
    return written + sum(read)


def _sliced(program: Program, fusion: Instruction, written: float, read: list[float]) -> tuple[float, list[float]]:
    """The same where a fusion takes only slices of an operand, or writes only a slice of its result in place."""
    called = next((name for name, *_ in program.calls(fusion)), "")
    body, names = program.computations.get(called, ()), program.by_name.get(called, {})
    read = list(read)
    for parameter in (i for i in body if i.opcode == "parameter"):
        place = int(parameter.arguments.strip("()"))
        users = [i for i in body if parameter.name in i.operands]
        if place >= len(read) or not users:
            continue
        if all(i.opcode in ("dynamic-slice", "slice", "gather") for i in users):
            read[place] = min(read[place], sum(i.bytes for i in users))
        elif all(i.opcode == "dynamic-update-slice" and i.operands[0] == parameter.name for i in users):
            read[place] = 0
    roots = [i for i in body if i.root]
    if roots and roots[0].opcode == "tuple":
        roots = [names[operand] for operand in roots[0].operands if operand in names]
    for root in roots:
        if root.opcode == "dynamic-update-slice" and root.operands[1] in names:
            written -= max(0, root.bytes - names[root.operands[1]].bytes)
    return max(0, written), read


def _main(instruction: Instruction, rows: float = 1.0) -> float:
    """Bytes of what an instruction yields that stand in main memory; of matrices, this share of their rows."""
    return sum(array.bytes * (rows if len(array.shape) == 2 else 1) for array in instruction.arrays if array.space == 0)
