"""Exchanges in chunks: the same results, gradients and drops as at once, and one exchange each way for every chunk."""

from __future__ import annotations

import dispatch_programs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dispatch_cases import LOADS, S, assert_close, with_gradients

from sparse_lm.config import ConfigError
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.dispatch import DISPATCHERS
from sparse_lm.moe.dispatch.base import in_chunks
from sparse_lm.moe.layer import MoE
from sparse_lm.moe.slots import SlotRule
from sparse_lm.sharding import DEFAULT

MOVING = [name for name, cls in DISPATCHERS.items() if cls.moves_tokens]


@pytest.mark.parametrize(("chunks", "seen"), [(1, [5]), (2, [2, 3]), (3, [1, 2, 2]), (9, [1] * 5)])
def test_chunks_are_of_the_second_axis_and_at_most_a_row_apart(chunks, seen):
    sizes = []

    def body(inputs):
        x, nothing = inputs
        assert nothing is None
        sizes.append(x.shape[1])
        return x + 1, x[..., 0] * 2

    x = jnp.arange(20.0).reshape(2, 5, 2)
    plus, twice = in_chunks(body, (x, None), chunks)
    np.testing.assert_array_equal(plus, x + 1)
    np.testing.assert_array_equal(twice, x[..., 0] * 2)
    assert sizes == seen


@pytest.mark.parametrize("name", MOVING)
def test_chunks_change_neither_results_nor_gradients_nor_drops(name, mesh_of):
    mesh, rule = mesh_of(data=2, expert=2), SlotRule(2)
    at_once, chunked = (
        with_gradients(DISPATCHERS[name](rule, DEFAULT, exchange_chunks=n), mesh, LOADS["mixed"], dropout=0.3)
        for n in (1, 2)
    )
    assert_close(chunked, at_once)
    dropped = DISPATCHERS[name].has_capacity
    assert np.any(at_once[1] != (LOADS["mixed"] >= 0)) == dropped


@pytest.mark.parametrize("name", MOVING)
def test_every_chunk_is_exchanged_by_itself(name, mesh_of):
    sizes = dispatch_programs.Sizes(size=16, width=8, hidden=8, slots=4, room=4.0)
    program = dispatch_programs.compiled(name, sizes, mesh_of(expert=4), chunks=2)
    assert sum(one.opcode == "all-to-all" for one in dispatch_programs.instructions(program)) == 2 * 2


def test_the_layer_hands_the_option_on_and_others_refuse_it():
    config = MoEConfig(dispatcher="all_to_all", exchange_chunks=3)
    assert MoE(jax.random.key(0), 4, 4, "relu", config, DEFAULT).dispatcher(S, True).exchange_chunks == 3
    with pytest.raises(
        ConfigError, match=r"exchange_chunks=3.*gather exchanges nothing; use 1, or dispatcher=all_to_all"
    ):
        MoEConfig(exchange_chunks=3)
