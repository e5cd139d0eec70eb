"""Claims: what each compares, and when it is shown, contradicted, or neither."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sparse_lm.study.claims import Between, Comparison, Less, Monotone, Within, compare, judge

WORDS: dict[str, Any] = {"name": "n", "statement": "s"}


def values(**variants: list[float]) -> dict[str, dict[str, dict[int, float]]]:
    return {"loss": {name: dict(enumerate(found)) for name, found in variants.items()}}


def verdict(claim, **variants: list[float]) -> str:
    return judge(claim, values(**variants), "loss").verdict


def test_less():
    claim = Less("a", "b", **WORDS)
    assert verdict(claim, a=[1, 1.1, 1.2], b=[2, 2.1, 2.3]) == "shown"
    assert verdict(claim, a=[2, 2.1, 2.3], b=[1, 1.1, 1.2]) == "contradicted"
    assert verdict(claim, a=[1, 3, 2], b=[2, 2, 2]) == "not shown"


def test_differences_are_paired_by_seed():
    # Unpaired these overlap entirely; seed by seed a is lower by 0.1 each time.
    found = judge(Less("a", "b", **WORDS), values(a=[1.0, 5.0, 9.0], b=[1.1, 5.1, 9.1]), "loss")
    assert found.verdict == "shown"
    assert found.compared[0].differences == pytest.approx((-0.1, -0.1, -0.1))


def test_less_by_a_margin():
    low, high = [1.0, 1.1, 1.0], [1.2, 1.3, 1.2]
    assert verdict(Less("a", "b", by=0.1, **WORDS), a=low, b=high) == "shown"
    assert verdict(Less("a", "b", by=0.3, **WORDS), a=low, b=high) == "contradicted"


def test_equal_runs_neither_show_nor_contradict():
    assert verdict(Less("a", "b", **WORDS), a=[1, 2], b=[1, 2]) == "not shown"


def test_monotone_needs_every_pair_and_one_breaks_it():
    claim = Monotone(("a", "b", "c"), **WORDS)
    a, b, c = [3.0, 3.1, 3.2], [2.0, 2.1, 2.2], [1.0, 1.1, 1.2]
    assert claim.variants() == ("b", "a", "c")
    assert verdict(claim, a=a, b=b, c=c) == "shown"
    assert verdict(claim, a=a, b=b, c=[2.0, 2.2, 2.1]) == "not shown"
    assert verdict(claim, a=a, b=c, c=b) == "contradicted"


def test_within():
    claim = Within("a", "b", 0.5, **WORDS)
    assert verdict(claim, a=[1, 1.1, 1], b=[1.2, 1.1, 1.3]) == "shown"
    assert verdict(claim, a=[1, 1.1, 1], b=[2.2, 2.1, 2.3]) == "contradicted"
    assert verdict(claim, a=[1, 1.1, 1], b=[1.3, 1.8, 1.2]) == "not shown"


def test_between_looks_at_one_variant():
    claim = Between("a", low=0.5, **WORDS)
    assert claim.comparisons() == (Comparison("a", None, 0.5, math.inf),)
    assert verdict(claim, a=[1, 2, 1]) == "shown"
    assert verdict(claim, a=[0, 0, 0.1]) == "contradicted"
    assert verdict(claim, a=[0, 2, 1]) == "not shown"


def test_seeds_that_only_one_has_are_left_out():
    found = compare(Comparison("a", "b", high=0.0), {"a": {0: 1.0, 1: 1.0, 3: 1.0}, "b": {1: 2.0, 2: 0.0, 3: 2.5}})
    assert found.differences == (-1.0, -1.5)
    assert found.interval is not None and (found.interval.low, found.interval.high) == (-1.5, -1.0)


@pytest.mark.parametrize("b", [{}, {0: 2.0}])
def test_fewer_than_two_pairs_show_nothing(b):
    found = compare(Comparison("a", "b", high=0.0), {"a": {0: 1.0, 1: 1.0}, "b": b})
    assert (found.verdict, found.interval, found.smallest_detectable, found.luck) == ("not shown", None, None, 1.0)


def test_a_claim_may_be_about_another_measure():
    measured = values(a=[1, 1], b=[2, 2]) | {"drops": {"a": {0: 0.9, 1: 0.9}, "b": {0: 0.1, 1: 0.2}}}
    found = judge(Less("a", "b", measure="drops", **WORDS), measured, "loss")
    assert (found.measure, found.verdict) == ("drops", "contradicted")
    assert judge(Less("a", "b", measure="absent", **WORDS), measured, "loss").verdict == "not shown"


def test_words():
    assert Comparison("a", "b", high=0.0).words() == "a - b < 0"
    assert Comparison("a", "b", -0.5, 0.5).words() == "-0.5 < a - b < 0.5"
    assert Comparison("a", None, low=2.0).words() == "2 < a"
