"""More devices along `expert` than experts, or numbers that do not divide: the same results, experts stored once."""

from __future__ import annotations

import functools

import dispatch_programs
import jax
import numpy as np
import pytest
from dispatch_cases import RNG, D, G, K, S, assert_close, with_gradients

from sparse_lm.moe.dispatch import DISPATCHERS
from sparse_lm.moe.dispatch.dense import Dense
from sparse_lm.moe.dispatch.replicas import runs, sharers
from sparse_lm.moe.experts import Experts
from sparse_lm.moe.slots import SlotRule
from sparse_lm.sharding import DEFAULT

FEWER, UNEVEN = (4, {"expert": 8}), (6, {"expert": 4, "model": 2})  # experts, mesh
LOADS = {n: np.stack([RNG.permutation(n)[:K] for _ in range(G * S)]).reshape(G, S, K) for n in (4, 6)}
LIMITED, RATE, HIDDEN = SlotRule(2), 0.3, 8


def test_runs_of_neighbours_share_the_experts(mesh_of):
    assert sharers(6) == 1
    with jax.set_mesh(mesh_of(expert=8)):
        assert [sharers(n) for n in (2, 6, 3, 8, 16)] == [2, 2, 1, 8, 8]
        assert runs(8) is None
        assert runs(2) == [[0, 1], [2, 3], [4, 5], [6, 7]]


@functools.cache
def expected(experts, has_capacity):
    rule = LIMITED if has_capacity else SlotRule(S)
    return with_gradients(Dense(rule, DEFAULT), None, LOADS[experts], sizes=(experts, D, HIDDEN), dropout=RATE)


@pytest.mark.parametrize(
    ("name", "case", "chunks"),
    [
        ("all_to_all", FEWER, 1),
        ("all_to_all", UNEVEN, 1),
        ("ragged_all_to_all", FEWER, 2),
        ("ragged_all_to_all", UNEVEN, 1),
        ("gather", FEWER, 1),
        ("dropless", UNEVEN, 1),
    ],
    ids=str,
)
def test_results_and_gradients_are_those_of_one_device(name, case, chunks, mesh_of):
    experts, sizes = case
    dispatcher = DISPATCHERS[name](LIMITED, DEFAULT, exchange_chunks=chunks)
    got = with_gradients(dispatcher, mesh_of(**sizes), LOADS[experts], sizes=(experts, D, HIDDEN), dropout=RATE)
    assert_close(got, expected(experts, dispatcher.has_capacity))


def test_experts_are_stored_once_cut_along_their_hidden_width(mesh_of):
    experts, sizes = UNEVEN
    with jax.set_mesh(mesh_of(**sizes)):
        stored = DEFAULT.shard_parameters(Experts(jax.random.key(0), (experts, D, HIDDEN), "swiglu", bias=True))
        assert stored.up_EDF.addressable_shards[0].data.shape == (6, D, 1)
        assert stored.down_EFD.addressable_shards[0].data.shape == (6, 1, D)
        assert stored.up_bias_EF.addressable_shards[0].data.shape == (6, 1)
        assert stored.down_bias_ED.addressable_shards[0].data.shape == (6, D)


def test_a_device_gets_the_weights_of_its_own_experts_alone(mesh_of):
    sizes = dispatch_programs.Sizes(groups=8, size=16, experts=4, width=8, hidden=16, slots=4)
    program = dispatch_programs.compiled("all_to_all", sizes, mesh_of(expert=8))
    assert "all-gather" not in dispatch_programs.moves(program)
    assert sum(one.opcode == "all-to-all" for one in dispatch_programs.instructions(program)) == 3 + 2
