"""Tokenizers turn text to ids and back, and refuse ids and words they do not know."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.data.tokenizers import ByteTokenizer, FactTokenizer, SymbolTokenizer, Tokenizer

BYTES = ByteTokenizer()
FACTS = FactTokenizer(num_a=3, num_b=2, num_values=4)


def test_special_ids_follow_the_bytes():
    special = [BYTES.pad, BYTES.bos, BYTES.eos, BYTES.mask, BYTES.sep, BYTES.cls]
    assert special == [256, 257, 258, 259, 260, 261]
    assert BYTES.vocab_size == 264
    assert BYTES.vocab_size % 8 == 0


def test_bytes_by_hand():
    ids = BYTES.encode("aé\n")
    assert ids.dtype == np.int32
    assert ids.tolist() == [97, 0xC3, 0xA9, 10]
    assert BYTES.encode(b"\x00\xff").tolist() == [0, 255]
    assert BYTES.encode("").tolist() == []


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_comes_back(text):
    assert BYTES.decode(BYTES.encode(text)) == text


@given(st.binary(), st.lists(st.integers(256, 263)))
def test_specials_are_dropped_and_bytes_kept(data, specials):
    ids = [*specials, *data, *specials]
    assert BYTES.decode_bytes(ids) == data


def test_broken_utf8_shows():
    assert BYTES.decode([97, 0xC3, 98]) == "a\ufffdb"
    assert BYTES.decode(np.array([[97, 98]])) == "ab"
    assert BYTES.decode(iter([97])) == "a"


def test_lone_surrogate_is_refused():
    with pytest.raises(UnicodeEncodeError):
        BYTES.encode("\ud800")


@pytest.mark.parametrize("tokenizer", [BYTES, SymbolTokenizer(264), FactTokenizer(100, 100, 63)])
@pytest.mark.parametrize("bad", [-1, 264])
def test_foreign_ids_are_refused(tokenizer: Tokenizer, bad: int):
    with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 264"):
        tokenizer.decode([0, bad])


def test_symbols():
    tokenizer = SymbolTokenizer(20)
    assert tokenizer.decode(np.array([3, 0, 17])) == "3 0 17"
    assert tokenizer.encode("3 0 17").tolist() == [3, 0, 17]
    with pytest.raises(ValueError, match="token id 20"):
        tokenizer.encode("20")
    with pytest.raises(ValueError, match="invalid literal"):
        tokenizer.encode("three")


def test_facts_by_hand():
    assert FACTS.vocab_size == 10
    assert FACTS.separator == 9
    assert FACTS.decode(range(10)) == "a0 a1 a2 b0 b1 v0 v1 v2 v3 |"


@given(st.lists(st.integers(0, 9)))
def test_facts_come_back(ids):
    assert FACTS.encode(FACTS.decode(ids)).tolist() == ids


@pytest.mark.parametrize("word", ["a3", "b2", "v4", "c0", "a", "a-1", "||"])
def test_unknown_words_are_refused(word):
    with pytest.raises(ValueError, match=r"names no token; known: a0\.\.a2, b0\.\.b1, v0\.\.v3 and"):
        FACTS.encode(f"a0 {word}")
