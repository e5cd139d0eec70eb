"""Packing: documents joined end to end in a shuffled order and cut into rows, no token lost and none repeated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from sparse_lm.batch import Batch


class Rows(Protocol):
    """Random access to rows; a row is a `Batch` whose arrays have the shape [length + 1], int32."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


def make_batch(tokens: Any, segments: Any, positions: Any, targets: Any, domains: Any) -> Batch:
    """A `Batch` of numpy int32 arrays, whatever integers they were."""
    return Batch(*(np.asarray(column, np.int32) for column in (tokens, segments, positions, targets, domains)))  # type: ignore[arg-type]


def stack_rows(rows: Sequence[Batch]) -> Batch:
    """Rows [L] stacked to a batch [B, L]."""
    columns = [field.name for field in dataclasses.fields(Batch)]
    return make_batch(*(np.stack([np.asarray(getattr(row, column)) for row in rows]) for column in columns))


def empty_row(width: int, pad: int) -> Batch:
    """A row without data: `pad` everywhere, segment 0, no targets."""
    zeros = np.zeros(width, np.int32)
    return make_batch(np.full(width, pad), zeros, zeros, zeros, zeros)


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows:
    """Packed documents, stored as one stream of tokens and expanded row by row. Made by `pack`.

    tokens: uint16 [rows * width], the last row padded.
    starts: int64 [documents], where each document starts in the stream; strictly increasing from 0.
    document_domains: int32 [documents].
    total: tokens that are data. width: tokens of a row. pad: the id that fills the last row.
    """

    tokens: np.ndarray
    starts: np.ndarray
    document_domains: np.ndarray
    total: int
    width: int
    pad: int

    def __len__(self) -> int:
        return len(self.tokens) // self.width

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        low = index * self.width
        high = min(low + self.width, self.total)
        first = int(np.searchsorted(self.starts, low, "right")) - 1
        begins = np.maximum(self.starts[first : np.searchsorted(self.starts, high, "left")] - low, 0)
        part = np.zeros(high - low, np.int64)
        part[begins[1:]] = 1
        part = np.cumsum(part)
        columns = np.zeros((4, self.width), np.int32)
        columns[0, : high - low] = part + 1
        columns[1, : high - low] = np.arange(high - low) - begins[part]
        columns[2] = columns[1] > 0
        columns[3, : high - low] = self.document_domains[first + part]
        return make_batch(self.tokens[low : low + self.width], *columns)

    @property
    def padding(self) -> int:
        """Tokens of the last row that are no data."""
        return len(self.tokens) - self.total

    def part_starts(self) -> np.ndarray:
        """Where in the stream the parts start into which rows cut the documents, int64, increasing.

        These tokens, and no other tokens of data, are not predicted.
        """
        return np.union1d(self.starts, np.arange(0, self.total, self.width))

    def predicted(self) -> np.ndarray:
        """The tokens that are targets, in the order of the stream."""
        return np.delete(self.tokens[: self.total], self.part_starts())


def pack(
    documents: Sequence[np.ndarray], domains: Sequence[int], width: int, *, eos: int | None, pad: int, seed: int
) -> PackedRows:
    """Documents (each a vector of ids under 65536), in an order drawn by `seed`, cut into rows of `width` tokens.

    `eos` follows every document and belongs to it; None adds nothing. A document that meets the end of a row goes on
    in the next one as a part of its own. Raises `ValueError` when there is no document, or an empty one without `eos`.
    """
    if not len(documents) or len(documents) != len(domains):
        raise ValueError(
            f"cannot pack {len(documents)} documents with {len(domains)} domains; give one of each or more"
        )
    order = np.random.default_rng(seed).permutation(len(documents))
    ends = np.cumsum([len(documents[i]) + (eos is not None) for i in order])
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    if (ends == starts).any():
        raise ValueError("cannot pack an empty document without an end-of-document token; leave it out")
    total = int(ends[-1])
    tokens = np.full(-(-total // width) * width, pad, np.uint16)
    for start, index in zip(starts, order, strict=True):
        tokens[start : start + len(documents[index])] = documents[index]
    if eos is not None:
        tokens[ends - 1] = eos
    return PackedRows(tokens, starts, np.asarray(domains, np.int32)[order], total, width, pad)
