"""Cleaning, interleaving and splitting of documents."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.config import ConfigError
from sparse_lm.data.documents import (
    DataError,
    Document,
    Intake,
    SourceFile,
    clean,
    split_documents,
    take_documents,
    unit_hash,
)

BAD = b"ok \xff\xfe end"

# (raw bytes, rule, what is kept, counts of empty, replaced, skipped)
CLEANED = [
    (b"plain", "error", b"plain", (0, 0, 0)),
    (b"\xef\xbb\xbfplain", "error", b"plain", (0, 0, 0)),
    (b"in\xef\xbb\xbfside", "error", b"in\xef\xbb\xbfside", (0, 0, 0)),
    (b"", "error", None, (1, 0, 0)),
    (b"\xef\xbb\xbf", "error", None, (1, 0, 0)),
    (b"a\x00b", "error", b"a\x00b", (0, 0, 0)),
    (BAD, "replace", "ok \ufffd\ufffd end".encode(), (0, 1, 0)),
    (BAD, "skip", None, (0, 0, 1)),
    (b"cut \xe2\x82", "replace", "cut \ufffd".encode(), (0, 1, 0)),
    (b"\xed\xa0\x80", "skip", None, (0, 0, 1)),  # a surrogate is no character
    (b"\xef\xbb\xbf\xff", "replace", "\ufffd".encode(), (0, 1, 0)),
]


@pytest.mark.parametrize(("raw", "rule", "kept", "counts"), CLEANED)
def test_clean_matrix(raw, rule, kept, counts):
    intake = Intake()
    assert clean("a.txt", raw, rule, intake) == kept
    assert (intake.empty, intake.replaced, intake.skipped) == counts


@pytest.mark.parametrize(("raw", "place"), [(BAD, "0xff at offset 3"), (b"\xef\xbb\xbfab\xc3", "0xc3 at offset 5")])
def test_undecodable_bytes_are_located_in_the_file(raw, place):
    with pytest.raises(DataError, match=rf"dir/a\.txt: byte {place} is not UTF-8; .*data\.invalid_utf8"):
        clean("dir/a.txt", raw, "error", Intake())


@given(st.binary(max_size=60))
def test_clean_leaves_valid_utf8(raw):
    kept = clean("a", raw, "replace", Intake())
    assert kept is None or kept.decode("utf-8").encode("utf-8") == kept


def test_unit_hash_is_the_head_of_sha256():
    expected = int.from_bytes(hashlib.sha256(b"abc").digest()[:8], "big") / 2**64
    assert unit_hash("abc") == pytest.approx(expected, abs=2**-52)
    assert 0 <= min(unit_hash(str(i)) for i in range(1000)) < 0.01
    assert 0.99 < max(unit_hash(str(i)) for i in range(1000)) < 1
    assert unit_hash("file\udcff") != unit_hash("file")


def files_of(texts: dict[str, list[bytes]], opened: list[str] | None = None) -> dict[str, list[SourceFile]]:
    def reader(name, data):
        def read():
            if opened is not None:
                opened.append(name)
            yield name, data

        return SourceFile(name, read)

    return {
        domain: [reader(f"{domain}{i}", data) for i, data in enumerate(contents)] for domain, contents in texts.items()
    }


def test_domains_take_turns_until_all_are_read():
    corpus = take_documents(files_of({"b": [b"x"] * 3, "a": [b"y"]}))
    assert [document.domain for document in corpus.documents] == ["a", "b", "b", "b"]
    assert corpus.intake == Intake(documents=4, bytes=4)
    assert {document.name for document in corpus.documents} == {"a0", "b0", "b1", "b2"}


def test_order_within_a_domain_is_by_hash_and_not_by_the_list():
    files = files_of({"a": [b"x"] * 30})["a"]
    forwards = take_documents({"a": files}).documents
    assert forwards == take_documents({"a": files[::-1]}).documents
    assert [document.name for document in forwards] != [file.name for file in files]


def test_small_limit_keeps_all_domains_and_opens_no_more_files():
    opened: list[str] = []
    files = files_of({"a": [b"1234"] * 50, "b": [b"12"] * 50, "c": [b"123456"] * 50}, opened)
    corpus = take_documents(files, max_bytes=17)
    assert [(document.domain, document.data) for document in corpus.documents] == [
        ("a", b"1234"),
        ("b", b"12"),
        ("c", b"123456"),
        ("a", b"1234"),
        ("b", b"1"),
    ]
    assert corpus.intake.bytes == 17
    assert len(opened) == 5


def test_limit_met_exactly_cuts_nothing():
    corpus = take_documents(files_of({"a": [b"12", b"34", b"56"]}), max_bytes=4)
    assert [len(document.data) for document in corpus.documents] == [2, 2]


def test_cut_falls_between_characters():
    corpus = take_documents(files_of({"a": ["ab€".encode()]}), max_bytes=4)
    assert corpus.documents[0].data == b"ab"
    assert corpus.intake.bytes == 2
    assert take_documents(files_of({"a": ["€".encode()]}), max_bytes=2).documents == ()


def test_left_out_documents_are_counted_and_cost_no_turn():
    corpus = take_documents(files_of({"a": [b"", b"\xff", b"x\x00\x00"], "b": [b""]}), "skip")
    assert [document.name for document in corpus.documents] == ["a2"]
    assert corpus.intake == Intake(documents=1, bytes=3, empty=2, skipped=1, nul=2)


def make_documents(count: int, domain: str = "text") -> list[Document]:
    return [Document(f"{domain}/{i}", domain, b"x") for i in range(count)]


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(1, 4))
def test_split_is_a_partition_with_both_sides_of_every_domain(count, fraction, domains):
    documents = [document for d in range(domains) for document in make_documents(count, f"d{d}")]
    train, validation = split_documents(documents, fraction)
    assert sorted(d.name for d in train + validation) == sorted(d.name for d in documents)
    assert {d.domain for d in train} == {d.domain for d in validation} == {f"d{d}" for d in range(domains)}


def test_split_is_by_hash_of_the_name():
    documents = make_documents(400)
    train, validation = split_documents(documents, 0.1)
    assert {d.name for d in validation} == {d.name for d in documents if unit_hash(d.name) < 0.1}
    assert 20 <= len(validation) <= 60
    more_train, more_validation = split_documents(make_documents(500), 0.1)
    assert {d.name for d in train} <= {d.name for d in more_train}
    assert {d.name for d in validation} <= {d.name for d in more_validation}


def test_one_name_in_two_domains_stays_together():
    documents = make_documents(40, "code")
    documents += [Document(document.name, "docs", b"y") for document in documents]
    train, validation = split_documents(documents, 0.3)
    assert {d.name for d in train}.isdisjoint(d.name for d in validation)
    assert len(validation) == 2 * len({d.name for d in validation})


def test_domains_of_one_document_each_still_fill_both_sides():
    documents = make_documents(1, "a") + make_documents(1, "b")
    for fraction in (0.001, 0.999):
        train, validation = split_documents(documents, fraction)
        assert (len(train), len(validation)) == (1, 1)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_documents_say_what_to_change(count):
    with pytest.raises(ConfigError, match=r"data\.validation_fraction=0\.05: .*several files.*jsonl"):
        split_documents(make_documents(count), 0.05)
