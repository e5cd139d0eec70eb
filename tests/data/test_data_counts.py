"""Counts of token ids: by hand, against the rows that training reads, and balanced hashing from them."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_lm.config import ConfigError
from sparse_lm.data.config import DataConfig, FactsConfig, GrammarConfig
from sparse_lm.data.counts import token_counts
from sparse_lm.data.loader import build_dataset
from sparse_lm.moe.routers.hash import Hash, balanced_table

GRAMMAR = DataConfig(
    source="grammar",
    length=12,
    validation_fraction=0.2,
    grammar=GrammarConfig(num_domains=3, num_symbols=6, branching=2, document_length=20, num_documents=64),
)


def counted(config: DataConfig, number: int | None = None) -> np.ndarray:
    """Real inputs of the first rows (None: all), one row at a time."""
    dataset = build_dataset(config)
    counts = np.zeros(dataset.vocab_size)
    for i in range(number or len(dataset.train)):
        row = dataset.train[i]
        tokens, segments = np.asarray(row.tokens_BL)[:-1], np.asarray(row.segments_BL)[:-1]
        np.add.at(counts, tokens[segments > 0], 1)
    return counts


def write(folder, names: dict[str, str]) -> DataConfig:
    for name, text in names.items():
        (folder / name).write_text(text)
    return DataConfig(source="text", path=str(folder), length=4, validation_fraction=0.5)


def test_text_by_hand(tmp_path):
    """Training has one document of 8 bytes and its end: rows of 5 are `aaaab`, `bbc` + end + padding."""
    config = write(tmp_path, {f"{i}.txt": "aaaabbbc" for i in range(2)})
    dataset = build_dataset(config)
    assert len(dataset.train) == 2
    counts = token_counts(config)
    assert len(counts) == dataset.vocab_size
    expected = {ord("a"): 4.0, ord("b"): 2.0, ord("c"): 1.0}
    end = int(np.asarray(dataset.train[1].tokens_BL)[3])
    assert {i: count for i, count in enumerate(counts) if count} == {**expected, end: 1.0}


@pytest.mark.parametrize("length", [12, 7])
def test_counts_are_those_of_the_rows(length):
    config = GRAMMAR.replace(length=length)
    counts = token_counts(config)
    np.testing.assert_array_equal(counts, counted(config))
    assert len(counts) == 6 and min(counts) > 0


def test_another_order_of_documents_changes_the_ends_of_rows_alone():
    one, other = (np.array(token_counts(GRAMMAR, seed)) for seed in (0, 1))
    assert one.sum() == other.sum()
    assert np.abs(one - other).max() < 0.1 * one.sum()


def test_facts_are_expected_counts():
    config = DataConfig(source="facts", length=12, facts=FactsConfig(num_a=5, num_b=4, num_values=7))
    counts = np.array(token_counts(config))
    assert counts.sum() == pytest.approx(12)  # inputs of a row
    np.testing.assert_allclose(counts[:9], [4 / 5] * 5 + [1] * 4)
    assert counts[-1] == 1  # the separator
    number = 3000
    measured = counted(config, number)
    assert np.all(np.abs(measured - number * counts) < 4.5 * np.sqrt(number * counts) + 1e-9)


def test_hashing_balanced_by_counts_is_balanced_on_the_rows():
    config = GRAMMAR.replace(grammar__num_symbols=40, grammar__branching=3)
    router = Hash(mode="balanced", frequencies=token_counts(config))
    expert_V = balanced_table(router.frequencies, 4, 1)[:, 0]
    load_E = np.bincount(expert_V, weights=counted(config), minlength=4)
    assert load_E.max() / load_E.mean() < 1.1
    even_E = np.bincount(np.arange(40) % 4, weights=counted(config), minlength=4)
    assert even_E.max() / even_E.mean() > load_E.max() / load_E.mean()


def test_what_the_dataset_refuses_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path.*no such file or folder"):
        token_counts(DataConfig(source="text", path=str(tmp_path / "none")))
