"""Classes of tokens and of places, and how tokens are shown."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from sparse_lm.analysis.classes import Labels, context, position_bins, token_classes, token_name
from sparse_lm.data.tokenizers import ByteTokenizer, FactTokenizer, SymbolTokenizer

BYTES = ByteTokenizer()


@pytest.mark.parametrize(
    ("token", "name"),
    [
        (ord("q"), "lower-case letter"),
        (ord("Q"), "upper-case letter"),
        (ord("7"), "digit"),
        (ord(" "), "space"),
        (ord("\n"), "line end"),
        (ord("\t"), "other whitespace"),
        (ord("["), "bracket"),
        (ord("'"), "quote"),
        (ord("_"), "underscore"),
        (ord(","), "sentence mark"),
        (ord("="), "operator, other sign"),
        (0, "control byte"),
        (127, "control byte"),
        (128, "not ASCII"),
        (255, "not ASCII"),
        (ByteTokenizer.eos, "special token"),
        (263, "special token"),
    ],
)
def test_the_class_of_a_byte(token, name):
    classes = token_classes(BYTES)
    assert classes.names[classes.index_M[token]] == name


def test_every_printable_byte_has_a_class_of_its_own_kind():
    classes = token_classes(BYTES)
    sizes = collections.Counter(classes.names[i] for i in classes.index_M)
    assert sum(sizes.values()) == BYTES.vocab_size == 264
    assert sizes["lower-case letter"] == sizes["upper-case letter"] == 26 and sizes["digit"] == 10
    assert sizes["control byte"] == 32 - 5 + 1 and sizes["not ASCII"] == 128 and sizes["special token"] == 8


def test_classes_of_synthetic_languages():
    symbols = token_classes(SymbolTokenizer(3))
    assert symbols.names == ("0", "1", "2") and symbols.index_M.tolist() == [0, 1, 2]
    facts = token_classes(FactTokenizer(2, 1, 3))
    assert [facts.names[i] for i in facts.index_M] == ["a", "a", "b", "value", "value", "value", "separator"]


def test_positions_by_powers_of_two():
    labels = position_bins(np.array([0, 1, 2, 3, 4, 7, 8, 15, 16]))
    assert labels.names == ("0", "1", "2-3", "4-7", "8-15", "16-31")
    assert labels.index_M.tolist() == [0, 1, 2, 2, 3, 3, 4, 4, 5]
    # Every bin holds what its name says, also where the logarithm is a whole number.
    places = np.arange(1, 5000)
    spans = [[int(x) for x in name.split("-")] for name in position_bins(places).names]
    for place, i in zip(places, position_bins(places).index_M, strict=True):
        assert spans[i][0] <= place <= spans[i][-1]


def test_unused_names_are_left_out():
    used = Labels(("a", "b", "c"), np.array([2, 0, 2])).used()
    assert used.names == ("a", "c") and used.index_M.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("token", "shown"),
    [(ord("a"), "a"), (ord("\n"), "⏎"), (ord(" "), "␣"), (0, "0x00"), (200, "0xc8"), (258, "[eos]"), (262, "[262]")],
)
def test_the_name_of_a_byte(token, shown):
    assert token_name(BYTES, token) == shown


def test_names_of_other_tokens():
    assert token_name(SymbolTokenizer(4), 3) == "3" and token_name(SymbolTokenizer(4), 4) == "id 4"
    assert token_name(FactTokenizer(2, 2, 2), 2) == "b0"


def test_context_of_bytes_stays_in_its_document():
    ids = BYTES.encode("before|one\ntwo three|after")
    at = len("before|one\nt")
    span = (len("before|"), len("before|one\ntwo three"))
    assert context(BYTES, ids, at, span) == "one⏎t«w»o three"
    assert context(BYTES, ids, at, span, width=2) == "⏎t«w»o "
    assert context(BYTES, ids, span[0], span, width=1) == "«o»n"
    # What XML cannot hold is left out; a cut character shows as one that is broken.
    assert context(BYTES, BYTES.encode("a\0é"), 0, (0, 3)) == "«a»�"


def test_context_of_symbols():
    tokenizer = SymbolTokenizer(9)
    assert context(tokenizer, np.arange(9), 4, (0, 9), width=6) == "2 3 «4» 5 6"
    assert context(tokenizer, np.arange(9), 4, (4, 6), width=6) == "«4» 5"
