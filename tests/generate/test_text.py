"""Text comes whole: no half characters, whatever way the bytes are cut."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.data.tokenizers import ByteTokenizer, FactTokenizer, SymbolTokenizer
from sparse_lm.generate.text import TextStream


def test_a_character_is_shown_once_it_is_whole():
    stream = TextStream(ByteTokenizer())
    euro = "€".encode()
    assert [stream.push([byte]) for byte in (*b"a", *euro, *b"b")] == ["a", "", "", "€", "b"]
    assert stream.finish() == ""


def test_a_character_that_is_cut_off_shows_at_the_end():
    stream = TextStream(ByteTokenizer())
    assert stream.push([0xF0, 0x9F]) == ""
    assert stream.finish() == "\ufffd"


def test_broken_utf8_shows_and_does_not_stop_the_stream():
    stream = TextStream(ByteTokenizer())
    assert stream.push([0xC3]) == ""
    assert stream.push([ord("x")]) == "\ufffdx"


def test_special_tokens_are_dropped():
    tokenizer = ByteTokenizer()
    assert TextStream(tokenizer).push([tokenizer.bos, *b"ab", tokenizer.pad, *b"c", tokenizer.eos]) == "abc"


@given(text=st.text(max_size=12), cuts=st.lists(st.integers(0, 40), max_size=6))
def test_pieces_make_the_text(text, cuts):
    data = list(text.encode())
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    stream = TextStream(ByteTokenizer())
    pieces = [stream.push(data[start:stop]) for start, stop in itertools.pairwise(bounds)]
    assert "".join(pieces) + stream.finish() == text


@given(data=st.lists(st.integers(0, 263), max_size=20))
def test_any_tokens_decode_as_at_once(data):
    stream = TextStream(ByteTokenizer())
    assert "".join(stream.push([token]) for token in data) + stream.finish() == ByteTokenizer().decode(data)


@pytest.mark.parametrize(
    ("tokenizer", "ids"), [(SymbolTokenizer(20), [3, 0, 17]), (FactTokenizer(4, 4, 8), [16, 3, 7, 15])]
)
def test_words_have_spaces_between(tokenizer, ids):
    stream = TextStream(tokenizer)
    assert stream.push(ids[:1]) + stream.push(ids[1:]) + stream.finish() == tokenizer.decode(ids)


def test_ids_beyond_the_vocabulary_show():
    assert TextStream(SymbolTokenizer(20)).push([3, 20, 4]) == "3 \ufffd 4"
    stream = TextStream(ByteTokenizer())
    assert stream.push([*b"a", 264, *b"b"]) == "a\ufffdb"
