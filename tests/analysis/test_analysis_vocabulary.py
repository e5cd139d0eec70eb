"""Characteristic tokens by hand, and the examples that go with them."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_lm.analysis.observe import Tokens
from sparse_lm.analysis.vocabulary import characteristic, vocabulary
from sparse_lm.data.tokenizers import ByteTokenizer, SymbolTokenizer

SYMBOLS = SymbolTokenizer(4)


def test_characteristic_tokens_by_hand():
    # 40 assignments; symbol 0 is 20 of them, 1 is 10, 2 is 8, 3 is 2.
    counts = np.array([[5, 10, 4, 1], [15, 0, 4, 1], [0, 0, 0, 0]])
    first, second, unused = characteristic(counts, SYMBOLS, least=2)
    # Symbol 2 is as common with the first as anywhere (20 % of all), 0 rarer.
    assert [(w.token, w.name, w.count) for w in first] == [(1, "1", 10)]
    assert first[0].lift == pytest.approx((10 / 20) / (10 / 40))
    assert [(w.token, w.lift) for w in second] == [(0, pytest.approx((15 / 20) / (20 / 40)))]
    assert unused == ()


def test_the_threshold_and_the_order():
    counts = np.array([[2, 6, 6, 1], [20, 20, 20, 0]])
    assert [w.token for w in characteristic(counts, SYMBOLS, least=1)[0]] == [3, 1, 2]
    assert [w.token for w in characteristic(counts, SYMBOLS, least=5)[0]] == [1, 2]
    assert [w.token for w in characteristic(counts, SYMBOLS, least=1, most=1)[0]] == [3]
    # Equal lift: the more frequent first.
    assert [w.token for w in characteristic(np.array([[3, 7, 0, 0], [0, 0, 5, 5]]), SYMBOLS, least=1)[0]] == [1, 0]


def text_tokens(*texts: str) -> Tokens:
    ids = ByteTokenizer().encode("".join(texts))
    part = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    return Tokens(ids, np.zeros_like(ids), np.zeros_like(ids), part)


def test_examples_are_where_the_gate_is_highest_within_one_document():
    texts = ("aabaa", "xxbxx", "cbccc")
    tokens = text_tokens(*texts)
    is_b = tokens.id_M == ord("b")
    expert = np.where(is_b, 1, 0)[:, None]
    gate = np.full((15, 1), 0.5)
    gate[7] = 0.9  # the b of the second text
    twice = _times(tokens, 2)
    others, only_b = vocabulary(twice, np.tile(expert, (2, 1)), np.tile(gate, (2, 1)), 2, ByteTokenizer())
    assert only_b.assignments == 6 and others.assignments == 24
    assert [(w.name, w.count) for w in only_b.words] == [("b", 6)]
    assert only_b.words[0].lift == pytest.approx(30 / 6)
    assert only_b.examples == ("xx«b»xx",)
    assert [w.name for w in others.words] == ["a", "c", "x"] and len(others.examples) == 3
    assert others.examples[0] == "«a»abaa"


def _times(tokens: Tokens, count: int) -> Tokens:
    part = np.concatenate([tokens.part_M + i * (tokens.part_M.max() + 1) for i in range(count)])
    ids, domain, position = (np.tile(x, count) for x in (tokens.id_M, tokens.domain_M, tokens.position_M))
    return Tokens(ids, domain, position, part)


def test_the_gate_that_counts_is_that_of_the_expert():
    tokens = _times(text_tokens("ab", "ac"), 5)
    expert = np.tile([0, 1], (20, 1))
    gate = np.tile([0.1, 0.2], (20, 1))
    gate[2] = [0.9, 0.0]  # the a of "ac" is surest of expert 0
    gate[8] = [0.0, 0.9]
    first, second = vocabulary(tokens, expert, gate, 2, ByteTokenizer())
    # Both experts have all tokens, so that nothing is characteristic of either.
    assert first.words == second.words == () and first.assignments == second.assignments == 20
    marked = np.where(tokens.id_M[:, None] == ord("a"), expert, -1)
    first, second = vocabulary(
        tokens, np.where(marked == 1, -1, np.where(marked < 0, 1, marked)), gate, 2, ByteTokenizer()
    )
    assert first.examples[0] == "«a»c" and first.words[0].name == "a"


def test_another_experts_gate_does_not_decide():
    tokens = _times(text_tokens("ab", "ac"), 5)
    is_a = tokens.id_M == ord("a")
    expert = np.stack([np.where(is_a, 0, -1), np.ones(20, np.int64)], axis=1)
    gate = np.tile([0.1, 0.2], (20, 1))
    gate[2] = [0.9, 0.0]  # here expert 0 is at its highest
    gate[0] = [0.3, 1.0]  # and here expert 1
    assert vocabulary(tokens, expert, gate, 2, ByteTokenizer())[0].examples == ("«a»c",)


def test_ids_beyond_the_tokenizer_are_counted():
    tokens = Tokens(np.full(6, 7), np.zeros(6, int), np.zeros(6, int), np.arange(6))
    (only,) = vocabulary(tokens, np.zeros((6, 1), np.int64), np.ones((6, 1)), 1, SYMBOLS)
    assert only.assignments == 6 and only.words == ()
