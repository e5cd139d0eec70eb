"""Packing against tables written by hand, and what must hold for any documents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.batch import Batch
from sparse_lm.data.packing import PackedRows, empty_row, make_batch, pack, stack_rows

EOS, PAD = 90, 91


def columns(row: Batch) -> list[list[int]]:
    arrays = [row.tokens_BL, row.segments_BL, row.positions_BL, row.targets_BL, row.domains_BL]
    assert all(isinstance(array, np.ndarray) and array.dtype == np.int32 for array in arrays)
    return [array.tolist() for array in arrays]


def test_table_by_hand():
    # Documents 1 2 3 eos | 4 eos | 5 6 7 8 9 eos, in this order, in rows of 5.
    rows = PackedRows(
        tokens=np.array([1, 2, 3, EOS, 4, EOS, 5, 6, 7, 8, 9, EOS, PAD, PAD, PAD], np.uint16),
        starts=np.array([0, 4, 6]),
        document_domains=np.array([7, 8, 9], np.int32),
        total=12,
        width=5,
        pad=PAD,
    )
    assert len(rows) == 3
    assert rows.padding == 3
    assert columns(rows[0]) == [[1, 2, 3, EOS, 4], [1, 1, 1, 1, 2], [0, 1, 2, 3, 0], [0, 1, 1, 1, 0], [7, 7, 7, 7, 8]]
    assert columns(rows[1]) == [[EOS, 5, 6, 7, 8], [1, 2, 2, 2, 2], [0, 0, 1, 2, 3], [0, 0, 1, 1, 1], [8, 9, 9, 9, 9]]
    assert columns(rows[2]) == [
        [9, EOS, PAD, PAD, PAD],
        [1, 1, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [9, 9, 0, 0, 0],
    ]
    assert rows.part_starts().tolist() == [0, 4, 5, 6, 10]
    assert rows.predicted().tolist() == [2, 3, EOS, 6, 7, 8, EOS]


def test_documents_that_end_with_the_row():
    rows = pack([np.array([1, 2])] * 4, [0] * 4, 6, eos=EOS, pad=PAD, seed=0)
    assert len(rows) == 2
    assert rows.padding == 0
    for row in (rows[0], rows[1]):
        assert columns(row)[:4] == [
            [1, 2, EOS, 1, 2, EOS],
            [1, 1, 1, 2, 2, 2],
            [0, 1, 2, 0, 1, 2],
            [0, 1, 1, 0, 1, 1],
        ]


documents_strategy = st.lists(st.lists(st.integers(0, 80), min_size=1, max_size=25), min_size=1, max_size=12)


@given(documents_strategy, st.integers(3, 12), st.integers(0, 5), st.booleans())
def test_no_token_is_lost_or_repeated(documents, width, seed, with_eos):
    eos = EOS if with_eos else None
    # The domain is the number of the document, so that rows tell which document a token came from.
    rows = pack([np.array(d) for d in documents], list(range(len(documents))), width, eos=eos, pad=PAD, seed=seed)
    found: dict[int, list[int]] = {}
    padding = 0
    for i in range(len(rows)):
        tokens, segments, _, _, domains = columns(rows[i])
        for token, segment, domain in zip(tokens, segments, domains, strict=True):
            if segment:
                found.setdefault(domain, []).append(token)
            else:
                padding += 1
                assert (token, i) == (PAD, len(rows) - 1)
    assert padding == rows.padding < width
    assert found == {i: [*d, EOS] if with_eos else d for i, d in enumerate(documents)}


@given(documents_strategy, st.integers(3, 12), st.integers(0, 5))
def test_segments_positions_and_targets_agree(documents, width, seed):
    rows = pack([np.array(d) for d in documents], [0] * len(documents), width, eos=EOS, pad=PAD, seed=seed)
    targets = []
    for i in range(len(rows)):
        row = rows[i]
        tokens, segments, positions = row.tokens_BL, row.segments_BL, row.positions_BL
        assert segments[0] == 1
        assert positions[0] == 0
        for at in range(1, width):
            if segments[at] == 0:
                assert segments[at:].sum() == row.targets_BL[at:].sum() == positions[at:].sum() == 0
                break
            starts = tokens[at - 1] == EOS
            assert segments[at] == segments[at - 1] + starts
            assert positions[at] == (0 if starts else positions[at - 1] + 1)
        assert ((row.targets_BL == 1) == (positions > 0)).all()
        targets += tokens[row.targets_BL == 1].tolist()
    assert targets == rows.predicted().tolist()


def test_order_comes_from_the_seed():
    documents = [np.array([i]) for i in range(50)]
    orders = [pack(documents, [0] * 50, 3, eos=None, pad=PAD, seed=seed).tokens.tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0][:50]) == sorted(orders[2][:50]) == list(range(50))


@pytest.mark.parametrize("index", [-1, 2])
def test_rows_end(index):
    rows = pack([np.arange(6)], [0], 3, eos=None, pad=PAD, seed=0)
    with pytest.raises(IndexError, match=f"row {index} of 2"):
        rows[index]


def test_bad_documents_are_refused():
    with pytest.raises(ValueError, match="cannot pack 0 documents"):
        pack([], [], 4, eos=EOS, pad=PAD, seed=0)
    with pytest.raises(ValueError, match="1 documents with 2 domains"):
        pack([np.array([1])], [0, 1], 4, eos=EOS, pad=PAD, seed=0)
    with pytest.raises(ValueError, match="empty document without an end-of-document token"):
        pack([np.array([1]), np.array([], int)], [0, 0], 4, eos=None, pad=PAD, seed=0)


def test_stacking():
    rows = [make_batch(*np.full((5, 3), value)) for value in (4, 5)]
    batch = stack_rows([*rows, empty_row(3, PAD)])
    assert columns(batch)[0] == [[4] * 3, [5] * 3, [PAD] * 3]
    assert columns(batch)[1] == columns(batch)[3] == [[4] * 3, [5] * 3, [0] * 3]
