"""Protocols: sizes by scale, and changes that reach all of them."""

from __future__ import annotations

import pytest

from sparse_lm.models.counts import count
from sparse_lm.study.protocols import domains, facts, full_width, moe, share_of_width, text
from sparse_lm.study.study import SCALES

ALL = pytest.mark.parametrize("protocol", [facts, text, domains])


@ALL
def test_scales_grow(protocol):
    scales = protocol()
    assert list(scales) == list(SCALES)
    sizes = [count(scales[name].base.model.replace(vocab_size=256, max_length=1024)).active for name in SCALES]
    tokens = [s.base.train.steps * s.base.train.batch_size * s.base.data.length for s in scales.values()]
    assert sizes == sorted(sizes) and tokens == sorted(tokens)
    assert sizes[0] < 200_000 and tokens[0] < 2_000_000
    assert [scale.seeds for scale in scales.values()] == [3, 5, 3]


@ALL
def test_changes_reach_every_scale(protocol):
    for scale in protocol((1, 2, 3), moe(num_experts=4, balance__load=0.5)).values():
        assert scale.base.model.moe.num_experts == 4 and scale.base.model.moe.balance.load == 0.5


@ALL
def test_every_scale_looks_often_enough_and_saves(protocol):
    for scale in protocol().values():
        train = scale.base.train
        assert train.steps // train.eval_every >= 8
        assert scale.base.checkpoint.every <= train.steps // 2


def test_facts_exceed_what_the_dense_model_stores():
    base = facts()["toy"].base
    bits = base.data.facts.num_a * base.data.facts.num_b * 6
    assert bits > count(base.model.replace(vocab_size=193, moe=None)).total / 2


def test_widths_follow_the_base():
    base = text()["small"].base
    assert full_width(base) == base.model.d_ff
    assert share_of_width(4)(base) == base.model.d_ff // 4
    assert share_of_width(4).__name__ == "d_ff / 4"
