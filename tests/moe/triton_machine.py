"""Executes programs in Triton's language on numpy arrays, one instruction after the other, where there is no GPU.

What Pallas' interpreter runs is the kernel as JAX sees it; this is what a GPU's compiler gets, pointers and masks
included. An element that is read or written outside of its array raises.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxlib.mlir import ir
from jaxlib.triton import dialect

DTYPES = {"i1": np.bool_, "i32": np.int32, "i64": np.int64, "f32": np.float32, "bf16": ml_dtypes.bfloat16}
COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
ARITHMETIC = {
    "arith.addi": np.add,
    "arith.addf": np.add,
    "arith.muli": np.multiply,
    "arith.andi": np.bitwise_and,
    "arith.divui": np.floor_divide,  # places in the grid, which are not negative
    "arith.remui": np.remainder,
}


class Pointer(NamedTuple):
    """Elements of a flat array."""

    array: np.ndarray
    place: np.ndarray

    def at(self, mask: np.ndarray) -> np.ndarray:
        """The places that the mask lets through. Raises `IndexError` beyond the array."""
        places = self.place[mask]
        if places.size and (places.min() < 0 or places.max() >= self.array.size):
            raise IndexError(f"place {places.min()} to {places.max()} of {self.array.size}")
        return places


class Call(NamedTuple):
    """A kernel of a lowered function."""

    grid: tuple[int, int, int]
    program: bytes


def calls(operation: Any) -> Iterator[Call]:
    """The Triton kernels of a lowered function, in order. operation: of its module."""
    for inner in (op.operation for region in operation.regions for block in region for op in block):
        if "mhlo.backend_config" in inner.attributes:
            config = ir.DictAttr(inner.attributes["mhlo.backend_config"])
            grid = [ir.IntegerAttr(config[f"grid_{axis}"]).value for axis in "xyz"]
            yield Call(tuple(grid), ir.StringAttr(config["ir"]).value_bytes)
        yield from calls(inner)


def text(program: bytes) -> str:
    """The program as it can be read; raises when an instruction gets what it cannot take."""
    with ir.Context() as context:
        return _parsed(program, context).operation.get_asm(print_generic_op_form=True)


def execute(call: Call, arrays: Sequence[np.ndarray]) -> None:
    """Runs every program of the grid. arrays: flat; what the kernel writes is written into them."""
    with ir.Context() as context:
        module = _parsed(call.program, context)  # what is in it lives as long as it does
        body = module.body.operations[0].operation.regions[0].blocks[0]
        pointers = [Pointer(array, np.zeros((), np.int64)) for array in arrays]
        for place in itertools.product(*map(range, call.grid)):
            _block(body, dict(zip(body.arguments, pointers, strict=True)), place)


def _parsed(program: bytes, context: Any) -> Any:
    dialect.register_dialect(context)
    module = ir.Module.parse(program)
    assert module.operation.verify()
    return module


def _block(block: Any, values: dict[Any, Any], place: tuple[int, ...]) -> list[Any]:
    """Runs a block's instructions and returns what the last one hands on."""
    for op in (op.operation for op in block):
        given = [values[operand] for operand in op.operands]
        if op.name in ("scf.yield", "tt.return"):
            return given
        if op.name == "scf.for":
            (first, end, step), carry = (int(one) for one in given[:3]), given[3:]
            inner = op.regions[0].blocks[0]
            for turn in range(first, end, step):
                here = dict(zip(inner.arguments, [np.int32(turn), *carry], strict=True))
                carry = _block(inner, values | here, place)
            values.update(zip(op.results, carry, strict=True))
        elif op.name == "tt.store":
            _store(*given)
        else:
            values[op.results[0]] = _value(op, given, place)
    raise AssertionError("a block ends in scf.yield or tt.return")


def _store(pointer: Pointer, value: np.ndarray, mask: np.ndarray | None = None) -> None:
    mask = np.ones(pointer.place.shape, bool) if mask is None else mask
    pointer.array[pointer.at(mask)] = value[mask]


def _load(pointer: Pointer, mask: np.ndarray | None = None, other: np.ndarray | None = None) -> np.ndarray:
    mask = np.ones(pointer.place.shape, bool) if mask is None else mask
    value = np.zeros(pointer.place.shape, pointer.array.dtype) if other is None else np.array(other)
    value[mask] = pointer.array[pointer.at(mask)]
    return value


def _value(op: Any, given: list[Any], place: tuple[int, ...]) -> Any:
    shape, dtype = _kind(str(op.results[0].type))
    attributes = op.attributes
    match op.name:
        case "tt.get_program_id":
            return np.int32(place[ir.IntegerAttr(attributes["axis"]).value])
        case "arith.constant":
            return np.asarray(attributes["value"].value, dtype)
        case "tt.make_range":
            return np.arange(*(ir.IntegerAttr(attributes[name]).value for name in ("start", "end")), dtype=np.int32)
        case "tt.addptr":
            return Pointer(given[0].array, given[0].place + given[1].astype(np.int64))
        case "tt.splat" | "tt.broadcast" if isinstance(given[0], Pointer):
            return Pointer(given[0].array, np.broadcast_to(given[0].place, shape))
        case "tt.splat" | "tt.broadcast":
            return np.broadcast_to(given[0], shape)
        case "tt.reshape" | "tt.expand_dims":
            return given[0].reshape(shape)
        case "tt.trans":
            return given[0].T
        case "tt.load":
            return _load(*given)
        case "tt.dot":
            return given[0].astype(np.float32) @ given[1].astype(np.float32) + given[2]
        case "arith.cmpi":
            return COMPARISONS[ir.IntegerAttr(attributes["predicate"]).value](*given)
        case "arith.truncf" | "arith.uitofp" | "arith.sitofp" | "arith.extf" | "arith.extui" | "arith.extsi":
            return given[0].astype(dtype)
        case name if name in ARITHMETIC:
            return ARITHMETIC[name](*given)
    raise NotImplementedError(f"{op.name}: teach it to this machine")


def _kind(written: str) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of a type as MLIR writes it; of a pointer no dtype."""
    *sizes, last = written.removeprefix("tensor<").removesuffix(">").split("x") if "tensor" in written else [written]
    return tuple(int(size) for size in sizes), DTYPES.get(last)
