"""More experts are timed against the fewest, beside what weights and products need at least."""

from __future__ import annotations

import json

import jax
import pytest
import tiny

from sparse_lm.bench import experts as module
from sparse_lm.bench.experts import COUNTS, FULL, Limit, Scaled, copy_bandwidth, experts, weight_bytes
from sparse_lm.bench.harness import Options, Paired
from sparse_lm.bench.layers import Sizes
from sparse_lm.config import ConfigError

SMALL = Sizes(tokens=64, group=32, d_model=8, d_ff=16)
LIMIT = Limit(flops=60.0, bytes=200.0, peak=10.0, bandwidth=100.0)
ROW = Scaled(32, "gather", Paired(1.5, 1.25, 2.0, 9.0, 6.0, 3), tokens=18, limit=LIMIT)


def test_the_limit_by_hand():
    assert (LIMIT.compute, LIMIT.memory, LIMIT.seconds) == (6.0, 2.0, 6.0)
    assert Limit(60.0, 800.0, 10.0, 100.0).seconds == 8.0


def test_bytes_of_weights_by_hand():
    # Two matrices of 8 x 8 in each of 4 experts, 4 bytes a number; read twice, gradients written once.
    assert weight_bytes(SMALL, 4) == 3 * 4 * 4 * 2 * 8 * 8
    assert weight_bytes(FULL, 512) == 64 * weight_bytes(FULL, 8)


def test_the_sizes_that_are_announced():
    assert (COUNTS[0], COUNTS[-1]) == (8, 512)
    assert FULL.tokens % FULL.group == 0
    assert FULL.tokens * module.TOP_K >= 16 * COUNTS[-1]  # every expert is touched, as the bytes assume


def test_the_bandwidth_counts_reading_and_writing():
    ticks = iter(range(100))
    assert copy_bandwidth(400, clock=lambda: 2.0 * next(ticks)) == 2 * 400 / 2.0


def test_a_row_as_text_json_and_drawn():
    cells = ROW.cells()
    assert (cells["experts"], cells["dispatcher"], cells["ms"]) == ("32", "gather", "9k")
    assert (cells["ratio to fewest"], cells["tokens/s"], cells["over limit"]) == ("1.50 (1.25..2.00)", "2", "1.50")
    assert (cells["compute ms"], cells["memory ms"]) == ("6k", "2k")
    row = json.loads(json.dumps(ROW.to_json()))
    assert (row["num_experts"], row["ratio"], row["seconds_a"], row["limit_seconds"]) == (32, 1.5, 9.0, 6.0)
    assert (row["compute_seconds"], row["memory_seconds"], row["bandwidth"]) == (6.0, 2.0, 100.0)
    drawn = ROW.drawn()
    assert (drawn.x, drawn.line, drawn.values) == (32, "gather", {"measured": 9000.0, "limit": 6000.0})


def test_each_number_of_experts_against_the_fewest(monkeypatch):
    peaks, bandwidths, made = iter([4e9, 5e9]), iter([2e9, 1e9]), []
    monkeypatch.setattr(module, "QUICK", SMALL)
    monkeypatch.setattr(module, "QUICK_COUNTS", (2, 4))
    monkeypatch.setattr(module, "matmul_peak", lambda dtype: next(peaks))
    monkeypatch.setattr(module, "copy_bandwidth", lambda size: next(bandwidths))
    time_sparse = module.time_sparse

    def spy(case, sizes, dtype, activation):
        made.append((case.num_experts, case.dispatcher, case.top_k))
        assert jax.sharding.get_abstract_mesh().size == 1
        return time_sparse(case, sizes, dtype, activation)

    monkeypatch.setattr(module, "time_sparse", spy)
    rows = experts(Options(tiny.experiment(), quick=True, repeats=2))
    assert made == [(count, name, 2) for name in ("dropless", "gather") for count in (2, 2, 4)]
    assert [(row.dispatcher, row.num_experts) for row in rows] == [
        (name, count) for name in ("dropless", "gather") for count in (2, 4)
    ]
    assert {(row.limit.peak, row.limit.bandwidth, row.tokens, row.paired.repeats) for row in rows} == {
        (5e9, 2e9, 64, 2)
    }
    # Useful FLOPs grow by the router alone: 6 x tokens x D for each expert more.
    assert rows[1].limit.flops - rows[0].limit.flops == 6 * 64 * 8 * 2
    assert rows[1].limit.bytes == 2 * rows[0].limit.bytes


def test_tokens_that_are_not_whole_groups_are_refused():
    with pytest.raises(ConfigError, match="tokens=100: must be a multiple of the group size 128"):
        experts(Options(tiny.experiment(), quick=True, tokens=100))
