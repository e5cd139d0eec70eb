"""Synthetic languages: exact entropies against enumeration and an independent filter, facts against their table."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.config import ConfigError
from sparse_lm.data import synthetic
from sparse_lm.data.config import FactsConfig, GrammarConfig
from sparse_lm.data.packing import PackedRows, pack
from sparse_lm.data.synthetic import ENDLESS, VALIDATION_FACT_ROWS, FactRows, Grammar, draw_grammar, fact_table

TINY = [
    GrammarConfig(num_domains=2, num_symbols=3, branching=2, order=1, document_length=8, num_documents=40, seed=1),
    GrammarConfig(num_domains=3, num_symbols=2, branching=2, order=2, document_length=9, num_documents=40, seed=2),
    GrammarConfig(num_domains=2, num_symbols=3, branching=2, order=3, document_length=8, num_documents=40, seed=3),
]


def rows_of(grammar: Grammar, width: int) -> PackedRows:
    symbols = [np.frombuffer(document.data, np.uint8) for document in grammar.corpus().documents]
    return pack(symbols, [0] * len(symbols), width, eos=None, pad=0, seed=0)


def next_probability(grammar: Grammar, domain: int, context: tuple[int, ...], symbol: int) -> float:
    number = int("".join(map(str, context)), grammar.config.num_symbols)
    slots = grammar.successors[domain, number].tolist()
    return float(grammar.probabilities[domain, number, slots.index(symbol)]) if symbol in slots else 0.0


def filtered_nats(grammar: Grammar, part: list[int]) -> list[float]:
    """Cost of each symbol by a filter over (domain, hidden context), started from the context *before* the part."""
    base, order = grammar.config.num_symbols, grammar.config.order
    contexts = list(itertools.product(range(base), repeat=order))
    belief = {
        (d, context): grammar.stationary[d, i] / grammar.config.num_domains
        for d in range(grammar.config.num_domains)
        for i, context in enumerate(contexts)
    }
    nats = []
    for symbol in part:
        moved: dict[tuple, float] = {}
        for (d, context), weight in belief.items():
            key = d, (*context[1:], symbol)
            moved[key] = moved.get(key, 0.0) + weight * next_probability(grammar, d, context, symbol)
        evidence = sum(moved.values())
        belief = {key: weight / evidence for key, weight in moved.items()}
        nats.append(-math.log(evidence))
    return nats


@pytest.mark.parametrize("config", TINY, ids=lambda config: f"order{config.order}")
@pytest.mark.parametrize("width", [3, 7, 20])
def test_best_loss_is_that_of_a_bayesian_filter(config, width):
    grammar = draw_grammar(config)
    rows = rows_of(grammar, width)
    expected, targets = 0.0, 0
    for i in range(len(rows)):
        row = rows[i]
        for segment in range(1, row.segments_BL.max() + 1):
            part = row.tokens_BL[row.segments_BL == segment].tolist()
            expected += sum(filtered_nats(grammar, part)[1:])
        targets += int(row.targets_BL.sum())
    assert grammar.best_loss(rows) == pytest.approx(expected / targets, abs=1e-9)


@pytest.mark.parametrize("config", TINY, ids=lambda config: f"order{config.order}")
@pytest.mark.parametrize("length", [1, 2, 5])
def test_strings_of_a_length_have_probability_one_together(config, length):
    grammar = draw_grammar(config)
    strings = list(itertools.product(range(config.num_symbols), repeat=length))
    begins = np.arange(len(strings)) * length
    first, whole = grammar.part_log_likelihoods(np.array(strings).ravel(), begins)
    np.testing.assert_allclose(np.exp(whole).sum(1), 1, atol=1e-10)
    if length == 1:
        np.testing.assert_array_equal(first, whole)


def test_sampled_documents_cost_what_enumeration_says():
    config = TINY[0].replace(num_documents=20_000)
    grammar = draw_grammar(config)
    strings = np.array(list(itertools.product(range(3), repeat=8)))
    first, whole = grammar.part_log_likelihoods(strings.ravel(), np.arange(len(strings)) * 8)
    # The mean of log p(first) - log p(string) over all 6561 strings of a document, by their exact probabilities.
    likely = np.isfinite(whole).any(0)
    heads, weights = np.exp(first[:, likely]).mean(0), np.exp(whole[:, likely]).mean(0)
    costs = np.log(heads / weights)
    expected = (weights * costs).sum() / 7
    spread = math.sqrt((weights * (costs / 7 - expected) ** 2).sum() / config.num_documents)
    assert abs(grammar.best_loss(rows_of(grammar, 8)) - expected) < 4 * spread
    assert spread < 0.005
    # Not knowing the domain costs something, and at most the log of their number per document.
    known = grammar.entropy_rates().mean()
    assert known < expected < known + math.log(2) / 7


def hand_made(successors: list, probabilities: list, stationary: list, **fields) -> Grammar:
    config = GrammarConfig(num_domains=len(successors), num_symbols=2, order=1, document_length=8, **fields)
    return Grammar(config, np.array(successors), np.array(probabilities), np.array(stationary))


def test_known_domains_by_hand():
    # One domain alternates, the other repeats: the second symbol tells (log 2), all after it are certain.
    grammar = hand_made([[[1], [0]], [[0], [1]]], [[[1.0], [1.0]]] * 2, [[0.5, 0.5]] * 2, branching=1, num_documents=64)
    assert grammar.best_loss(rows_of(grammar, 4)) == pytest.approx(math.log(2) / 3)
    assert grammar.best_loss(rows_of(grammar, 8)) == pytest.approx(math.log(2) / 7)
    assert grammar.entropy_rates().tolist() == [0, 0]


def test_entropy_rate_by_hand():
    # From 0: a fair coin. From 1: always 0. Stationary: 2/3, 1/3. Entropy: 2/3 log 2.
    successors, probabilities = [[[0, 1], [0, 1]]], [[[0.5, 0.5], [1.0, 0.0]]]
    grammar = hand_made(successors, probabilities, [[2 / 3, 1 / 3]], branching=2, num_documents=4000)
    assert grammar.entropy_rates() == pytest.approx([2 / 3 * math.log(2)])
    assert grammar.best_loss(rows_of(grammar, 8)) == pytest.approx(2 / 3 * math.log(2), abs=0.01)
    follow, transition = np.array(successors[0]), np.array(probabilities[0])
    found = synthetic._stationary(follow, transition, grammar.config)
    assert found == pytest.approx([2 / 3, 1 / 3], abs=1e-12)


def test_rows_without_targets_are_refused():
    grammar = draw_grammar(TINY[0])
    rows = pack([np.array([1]), np.array([2])], [0, 0], 3, eos=None, pad=0, seed=0)
    with pytest.raises(ConfigError, match=r"data\.length=2: no validation row has a target"):
        grammar.best_loss(rows)


def test_periodic_chain_has_a_stationary_distribution():
    # Period 2: from {0, 1} to {2, 3} and back, with as many ways in as out.
    follow = np.array([[2, 3], [3, 2], [0, 1], [1, 0]])
    transition = np.array([[0.9, 0.1], [0.5, 0.5], [0.7, 0.3], [1.0, 0.0]])
    found = synthetic._stationary(follow, transition, TINY[0])
    # 0 gets 0.7 of 2, and 2 gets 0.9 of 0 and half of 1 = 0.5 - 0: x = 0.7 (0.9 x + 0.5 (0.5 - x)).
    x = 0.7 * 0.25 / (1 - 0.7 * 0.4)
    assert found == pytest.approx([x, 0.5 - x, x / 0.7, 0.5 - x / 0.7], abs=1e-12)


def test_slow_chain_is_refused():
    near_one = 1 - 1e-9
    follow = np.array([[0, 1], [1, 0]])
    transition = np.array([[near_one, 1e-9], [1 - 1e-6, 1e-6]])
    with pytest.raises(ConfigError, match=r"data\.grammar\.seed=1: this chain mixes too slowly"):
        synthetic._stationary(follow, transition, TINY[0])


@given(st.integers(1, 3), st.integers(2, 5), st.integers(1, 5), st.integers(0, 99))
def test_tables_are_lawful(order, num_symbols, branching, seed):
    branching = min(branching, num_symbols)
    config = GrammarConfig(num_domains=2, num_symbols=num_symbols, branching=branching, order=order, seed=seed)
    grammar = draw_grammar(config)
    contexts = num_symbols**order
    assert grammar.successors.shape == grammar.probabilities.shape == (2, contexts, branching)
    np.testing.assert_allclose(grammar.probabilities.sum(2), 1)
    everything = np.arange(contexts)
    for domain in range(2):
        successors = grammar.successors[domain]
        assert all(len(set(slots)) == branching for slots in successors.tolist())
        follow = grammar.shift(everything[:, None], successors)
        assert (np.bincount(follow.ravel(), minlength=contexts) == branching).all()
        flow = np.zeros(contexts)
        np.add.at(flow, follow, grammar.stationary[domain][:, None] * grammar.probabilities[domain])
        np.testing.assert_allclose(flow, grammar.stationary[domain], atol=1e-12)
        assert (grammar.stationary[domain] > 0).all()
    bound = math.log(branching) + 1e-9
    assert (grammar.entropy_rates() <= bound).all()


def test_documents_follow_the_tables_from_first_to_last_symbol():
    config = TINY[0].replace(num_documents=20_000, num_domains=1)
    grammar = draw_grammar(config)
    symbols = np.stack([np.frombuffer(document.data, np.uint8) for document in grammar.corpus().documents])
    for place in (0, 3, 7):
        shares = np.bincount(symbols[:, place], minlength=3) / len(symbols)
        np.testing.assert_allclose(shares, grammar.stationary[0], atol=0.02)
    for context in range(3):
        here = symbols[symbols[:, 4] == context, 5]
        shares = np.bincount(here, minlength=3) / len(here)
        expected = [next_probability(grammar, 0, (context,), symbol) for symbol in range(3)]
        np.testing.assert_allclose(shares, expected, atol=0.02)


def test_corpus_is_reproducible_and_a_limit_only_shortens_it():
    grammar = draw_grammar(TINY[1])
    whole = grammar.corpus()
    assert whole == draw_grammar(TINY[1]).corpus()
    assert whole.documents != draw_grammar(TINY[1].replace(seed=9)).corpus().documents
    assert {document.domain for document in whole.documents} == set(grammar.domains)
    assert (whole.intake.documents, whole.intake.bytes) == (40, 360)
    assert grammar.corpus(100).documents == whole.documents[:11]
    assert len(grammar.corpus(1).documents) == 2


FACTS = FactsConfig(num_a=4, num_b=3, num_values=5, seed=7)


def test_fact_rows_are_triples_of_the_table():
    rows, table = FactRows.train(FACTS, 12, seed=0), fact_table(FACTS)
    assert table.shape == (4, 3)
    assert len(rows) == ENDLESS
    seen = set()
    for index in (*range(40), ENDLESS - 1):
        row = rows[index]
        tokens = row.tokens_BL
        assert tokens[0] == rows.tokenizer.separator == 12
        for a, b, v in tokens[1:].reshape(-1, 3).tolist():
            assert v - 7 == table[a, b - 4]
            seen.add((a, b - 4))
        assert row.segments_BL.tolist() == [1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]
        assert row.positions_BL.tolist() == [0, *[0, 1, 2] * 4]
        assert row.targets_BL.tolist() == [0, *[0, 0, 1] * 4]
        assert not row.domains_BL.any()
    assert seen == set(itertools.product(range(4), range(3)))


def test_fact_keys_are_uniform():
    rows = FactRows.train(FACTS, 3000, seed=0)
    keys = np.concatenate([rows[i].tokens_BL[1:].reshape(-1, 3)[:, :2] for i in range(12)])
    counts = np.zeros((4, 3))
    np.add.at(counts, (keys[:, 0], keys[:, 1] - 4), 1)
    assert abs(counts / 12_000 - 1 / 12).max() < 0.012  # 4.8 standard deviations


def test_fact_streams_differ_and_share_the_table():
    train, other = FactRows.train(FACTS, 30, seed=0), FactRows.train(FACTS, 30, seed=1)
    validation = FactRows.validation(FACTS, 30)
    assert len(validation) == VALIDATION_FACT_ROWS
    firsts = {rows[0].tokens_BL.tobytes() for rows in (train, other, validation)}
    assert len(firsts) == 3
    assert train[5].tokens_BL.tolist() == FactRows.train(FACTS, 30, seed=0)[5].tokens_BL.tolist()
    assert (train.table == validation.table).all()
    assert (fact_table(FACTS) != fact_table(FACTS.replace(seed=8))).any()


@pytest.mark.parametrize("index", [-1, VALIDATION_FACT_ROWS])
def test_fact_rows_end(index):
    with pytest.raises(IndexError, match=f"row {index} of {VALIDATION_FACT_ROWS}"):
        FactRows.validation(FACTS, 3)[index]
