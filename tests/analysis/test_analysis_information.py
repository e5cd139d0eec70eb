"""Mutual information, its baseline and lift: values by hand, and what must hold for any counts."""

from __future__ import annotations

import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sparse_lm.analysis.information import count_pairs, entropy, lift, mutual_information, specialisation


def test_pairs_by_hand():
    expert = np.array([[0, 1], [1, -1], [-1, -1], [2, 0]])
    np.testing.assert_array_equal(
        count_pairs(expert, np.array([0, 1, 1, 1]), 3, 2),
        [[1, 1], [1, 1], [0, 1]],
    )
    np.testing.assert_array_equal(count_pairs(expert, np.array([-1, 0, 0, -1]), 3, 1), [[0], [1], [0]])


@pytest.mark.parametrize(
    ("counts", "bits"),
    [
        ([[5, 0], [0, 5]], 1.0),
        ([[2, 2], [2, 2]], 0.0),
        ([[3, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0], [0, 0, 0, 3]], 2.0),
        # p = [3, 1; 1, 3] / 8: 2 * 3/8 * log2(3/2) + 2 * 1/8 * log2(1/2)
        ([[3, 1], [1, 3]], 0.75 * math.log2(1.5) - 0.25),
        # An expert of its own for half of one label: H(label) - H(label | expert) = 1 - 3/4 * H(1/3)
        ([[2, 1], [0, 1]], 1.0 - 0.75 * (math.log2(3) - 2 / 3)),
        ([[0, 0], [0, 0]], 0.0),
    ],
)
def test_mutual_information_by_hand(counts, bits):
    assert mutual_information(np.array(counts)) == pytest.approx(bits, abs=1e-12)


def test_entropy_by_hand():
    assert entropy(np.array([4, 4, 8, 0])) == pytest.approx(1.5)
    assert entropy(np.array([7])) == 0 and entropy(np.array([0, 0])) == 0
    assert math.copysign(1, entropy(np.array([7]))) == 1


TABLES = arrays.arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.integers(0, 30))


@hypothesis.given(TABLES)
def test_information_is_symmetric_and_within_both_entropies(counts):
    bits = mutual_information(counts)
    assert bits == pytest.approx(mutual_information(counts.T), abs=1e-9)
    bound = min(entropy(counts.sum(0)), entropy(counts.sum(1)))
    assert 0 <= bits <= bound + 1e-9
    assert bits == pytest.approx(mutual_information(3 * counts), abs=1e-9)


@hypothesis.given(TABLES)
def test_the_mean_of_lift_over_an_experts_tokens_by_label_is_one(counts):
    ratios = lift(counts)
    used = counts.sum(1) > 0
    share = counts.sum(0) / max(1, counts.sum())
    np.testing.assert_allclose(np.nansum(ratios[used] * share, axis=1), 1.0)
    assert np.isnan(ratios[~used]).all() and np.isnan(ratios[:, counts.sum(0) == 0]).all()


def test_lift_by_hand():
    np.testing.assert_allclose(lift(np.array([[6, 0], [2, 4]])), [[1 / (8 / 12), 0], [(2 / 6) / (8 / 12), 2.0]])


def test_knowledge_is_told_from_chance():
    rng = np.random.default_rng(0)
    label = rng.integers(4, size=2000)
    told = specialisation(label[:, None], label, (4, 4))
    assert told.bits == pytest.approx(told.entropy) and not told.chance
    assert told.share == pytest.approx(1, abs=0.01)
    blind = specialisation(rng.integers(4, size=(2000, 1)), label, (4, 4), shuffles=50)
    assert blind.chance and abs(blind.excess) < 0.003
    # Miller's bias of 3 x 3 degrees of freedom.
    assert blind.shuffled == pytest.approx(9 / (2 * 2000 * math.log(2)), rel=0.2)
    assert blind.highest >= blind.shuffled and blind.shuffles == 50


def test_the_experts_of_a_token_stay_together_in_a_shuffle():
    """Every token has both experts of a pair, so that counts say nothing and no shuffle can."""
    label = np.arange(100) % 2
    both = specialisation(np.tile([0, 1], (100, 1)), label, (2, 2))
    assert both.bits == both.shuffled == both.highest == 0


def test_labels_of_blocks_are_shuffled_as_wholes():
    """Twenty texts, each with an expert of its own, two kinds of texts dealt out at random: by token it looks like
    knowledge, by text it is what chance gives."""
    rng = np.random.default_rng(1)
    block = np.repeat(np.arange(20), 50)
    kind = rng.permutation(np.arange(20) % 2)[block]
    expert = block[:, None]
    by_token, by_text = (specialisation(expert, kind, (20, 2), blocks) for blocks in (None, block))
    assert by_token.bits == by_text.bits == pytest.approx(1)
    assert not by_token.chance and by_token.shuffled < 0.05
    assert by_text.chance and by_text.shuffled == pytest.approx(1)
    renamed = specialisation(expert, kind, (20, 2), block * 7 + 3)
    assert renamed == by_text


def test_the_same_seed_gives_the_same_baseline():
    rng = np.random.default_rng(2)
    expert, label = rng.integers(3, size=(300, 2)), rng.integers(2, size=300)
    one, same, other = (specialisation(expert, label, (3, 2), seed=seed).shuffled for seed in (5, 5, 6))
    assert one == same != other


def test_one_label_is_no_information_and_no_share():
    only = specialisation(np.zeros((10, 1), np.int64), np.zeros(10, np.int64), (2, 1))
    assert (only.bits, only.entropy, only.share, only.chance) == (0, 0, 0, True)


def test_what_cannot_be_shuffled_is_refused():
    label = np.array([0, 1, 1])
    with pytest.raises(ValueError, match="token 0 has another label"):
        specialisation(np.zeros((3, 1), np.int64), label, (1, 2), np.array([4, 4, 5]))
    with pytest.raises(ValueError, match="shuffles=0"):
        specialisation(np.zeros((3, 1), np.int64), label, (1, 2), shuffles=0)
