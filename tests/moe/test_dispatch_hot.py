"""Copies of the most loaded experts: the same results and gradients, less room, weights that move instead of rows."""

from __future__ import annotations

import functools

import dispatch_programs
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dispatch_cases import RNG, D, G, K, S, assert_close, with_gradients

from sparse_lm.config import ConfigError
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.dispatch.dense import Dense
from sparse_lm.moe.dispatch.hot import Hot
from sparse_lm.moe.dispatch.ragged_all_to_all import RaggedAllToAll
from sparse_lm.moe.layer import MoE
from sparse_lm.moe.slots import SlotRule
from sparse_lm.sharding import DEFAULT

EIGHT = {
    "mixed": np.stack([RNG.permutation(8)[:K] for _ in range(G * S)]).reshape(G, S, K),
    "one_device": np.broadcast_to([2, 3], (G, S, K)),
    "one_expert": np.broadcast_to([5, -1], (G, S, K)),
    "nobody": np.full((G, S, K), -1),
}
SIZES = (8, D, 8)


@functools.cache
def expected(load):
    return with_gradients(Dense(SlotRule(S), DEFAULT), None, EIGHT[load], sizes=SIZES, dropout=0.3)


@pytest.mark.parametrize("load", EIGHT)
@pytest.mark.parametrize(("copies", "sizes"), [(1, {"expert": 4}), (3, {"expert": 4}), (2, {"expert": 2, "model": 2})])
def test_copies_change_neither_results_nor_gradients(copies, sizes, load, mesh_of):
    dispatcher = RaggedAllToAll(SlotRule(S), DEFAULT, hot_copies=copies)
    got = with_gradients(dispatcher, mesh_of(**sizes), EIGHT[load], sizes=SIZES, dropout=0.3)
    assert_close(got, expected(load))


@pytest.mark.parametrize("copies", [0, 2, 8])
def test_copies_of_none_or_all_experts_and_in_chunks(copies, mesh_of):
    dispatcher = RaggedAllToAll(SlotRule(S), DEFAULT, hot_copies=copies, exchange_chunks=2)
    got = with_gradients(dispatcher, mesh_of(data=2, expert=4), EIGHT["mixed"], sizes=SIZES, dropout=0.3)
    assert_close(got, expected("mixed"))


def test_one_device_has_all_experts_and_no_copies():
    got = with_gradients(
        RaggedAllToAll(SlotRule(S), DEFAULT, hot_copies=2), None, EIGHT["mixed"], sizes=SIZES, dropout=0.3
    )
    assert_close(got, expected("mixed"))


@hypothesis.given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 16),
    st.lists(st.integers(0, 20), min_size=16, max_size=16),
    st.integers(1, 30),
)
def test_no_load_needs_more_room(devices, own, copies, weights, rows):
    """By brute force: every device has `rows` assignments, in the shares that the weights say."""
    experts = devices * own
    copies, share = min(copies, experts), np.asarray(weights[:experts], float) + 1e-9
    split = np.floor(share / share.sum() * rows).astype(int)
    split[np.argmax(share)] += rows - split.sum()
    load = devices * split
    hot = set(np.argsort(-load, kind="stable")[:copies]) if devices > 1 else set()
    arriving = [
        sum(load[e] for e in range(d * own, (d + 1) * own) if e not in hot) + sum(split[e] for e in hot)
        for d in range(devices)
    ]

    found = _room(Hot(jnp.zeros((len(hot),), jnp.int32), experts), devices, rows)
    assert max(arriving) <= found <= devices * rows


def _room(hot, devices, rows):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sparse_lm.moe.dispatch.hot.sharers", lambda _: devices)
        return hot.room(rows)


def test_room_falls_with_the_copies():
    rooms = [_room(Hot(jnp.zeros((copies,), jnp.int32), 8), 8, 100) for copies in (0, 1, 3, 7, 8)]
    assert rooms == [800, 500, 300, 200, 100]  # one expert per device: 1 / (1 + H) of all rows, and its own


def test_weights_of_the_copies_move_by_one_sum_each(mesh_of):
    sizes = (
        dispatch_programs.Sizes(groups=4, size=16, experts=4, width=24, hidden=40, copies=copies) for copies in (0, 2)
    )
    plain, copied = (
        dispatch_programs.moves(dispatch_programs.compiled("ragged_all_to_all", one, mesh_of(expert=4)))
        for one in sizes
    )
    weights = {(2, 24, 40), (2, 40, 24)}
    assert weights <= set(copied["all-reduce"]) and not weights & set(plain["all-reduce"])


def test_what_cannot_be_is_refused(mesh_of):
    with pytest.raises(ConfigError, match=r"hot_copies=2.*gather has the same room.*ragged_all_to_all"):
        MoEConfig(hot_copies=2)
    with pytest.raises(ConfigError, match=r"hot_copies=2.*dropless exchanges nothing.*ragged_all_to_all"):
        MoEConfig(hot_copies=2, dispatcher="dropless", capacity_factor=None, capacity_factor_eval=None)
    changes = {"dispatcher": "ragged_all_to_all", "capacity_factor": None, "capacity_factor_eval": None}
    with pytest.raises(ConfigError, match=r"hot_copies=9.*there are 8 experts"):
        MoEConfig(hot_copies=9, **changes)
    layer = MoE(jax.random.key(0), 4, 4, "relu", MoEConfig(hot_copies=3, **changes), DEFAULT)
    assert layer.dispatcher(S, True).hot_copies == 3
    with pytest.raises(ConfigError, match=r"hot_copies=2.*mesh.expert=4 does not divide the 6 experts"):
        with_gradients(
            RaggedAllToAll(SlotRule(S), DEFAULT, hot_copies=2),
            mesh_of(expert=4, model=2),
            EIGHT["mixed"] % 6,
            sizes=(6, D, 8),
        )
