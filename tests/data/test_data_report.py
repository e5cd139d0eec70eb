"""The report says what there was, and of oddities only those that there were."""

from __future__ import annotations

from sparse_lm.data.report import DataReport

FULL = DataReport(
    domains=("code", "docs"),
    train_bytes=(1200, 30),
    validation_bytes=(100, 7),
    documents=9,
    bytes=1337,
    empty=1,
    replaced=2,
    skipped=3,
    nul=4,
    train_rows=5,
    validation_rows=6,
    train_padding=7,
    validation_padding=8,
)


def test_all_counts_are_shown():
    assert FULL.lines() == [
        "9 documents, 1,337 bytes; rows: 5 train (7 padding tokens), 6 validation (8 padding tokens)",
        "  code: 1,200 bytes train, 100 validation",
        "  docs: 30 bytes train, 7 validation",
        "  1 empty documents left out; 2 documents with undecodable bytes replaced; "
        "3 documents with undecodable bytes left out; 4 NUL bytes kept",
    ]


def test_clean_endless_data_is_one_line():
    lines = DataReport(("facts",), validation_rows=4096).lines()
    assert lines == [
        "0 documents, 0 bytes; rows: endless train (0 padding tokens), 4,096 validation (0 padding tokens)"
    ]
