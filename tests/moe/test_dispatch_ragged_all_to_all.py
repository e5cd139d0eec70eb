"""Dropless expert parallelism: its table of traffic by hand, every load on a mesh, and who may not be cut."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dispatch_cases import LOADS, D, E, G, K, S, assert_close, with_gradients

from sparse_lm.moe.dispatch.dense import Dense
from sparse_lm.moe.dispatch.ragged_all_to_all import RaggedAllToAll, Traffic
from sparse_lm.moe.experts import Experts
from sparse_lm.moe.grouped import KERNELS, Layout
from sparse_lm.moe.grouped.megablox import Megablox
from sparse_lm.moe.slots import SlotRule
from sparse_lm.moe.types import TokenChoice
from sparse_lm.sharding import DEFAULT


def test_received_rows_go_to_their_expert_by_sender():
    # Two senders, two own experts: 2 and 1 rows from the first, 1 and 2 from the second.
    traffic = Traffic(jnp.zeros((2, 2), jnp.int32), jnp.asarray([[2, 1], [1, 2]]))
    side_by_side = Layout.of(jnp.asarray([3, 3]), size=1, total=8)
    np.testing.assert_array_equal(traffic.rows_in(side_by_side, 8), [0, 1, 3, 2, 4, 5, 8, 8])
    blocks = Layout.of(jnp.asarray([3, 3]), size=4, total=4)
    np.testing.assert_array_equal(traffic.rows_in(blocks, 8), [0, 1, 4, 2, 5, 6, 16, 16])


def test_one_device_sends_all_to_itself():
    traffic = Traffic.of(jnp.asarray([3, 0, 4]))
    assert traffic.devices == 1
    np.testing.assert_array_equal(traffic.size_NN, [[7]])
    np.testing.assert_array_equal(traffic.arriving_NE, [[3, 0, 4]])


@pytest.fixture(scope="module")
def mesh(mesh_of):
    return mesh_of(data=2, expert=2)


@pytest.mark.parametrize("name", LOADS)
def test_every_load_is_served_whole_on_a_mesh(name, mesh):
    got = with_gradients(RaggedAllToAll(SlotRule(1), DEFAULT), mesh, LOADS[name])
    expected = with_gradients(Dense(SlotRule(S), DEFAULT), mesh, LOADS[name])
    np.testing.assert_array_equal(got[1], LOADS[name] >= 0)
    assert_close(got, expected)


@pytest.mark.parametrize("kernel", ["ragged_dot", "megablox"])
def test_every_kernel_on_a_mesh(kernel, mesh, monkeypatch):
    monkeypatch.setitem(KERNELS, "megablox", Megablox(interpret=True))
    blocks = RaggedAllToAll(SlotRule(1), DEFAULT)
    got = with_gradients(RaggedAllToAll(SlotRule(1), DEFAULT, kernel), mesh, LOADS["mixed"], "input")
    expected = with_gradients(blocks, mesh, LOADS["mixed"], "input")
    assert_close(got, expected)


def test_which_kernels_the_shard_map_cannot_check():
    class Seen(Exception):  # noqa: N818
        pass

    def checked(kernel):
        class Rules(type(DEFAULT)):
            def per_device(self, *arguments):
                raise Seen(arguments[-1])

        rules = Rules(DEFAULT.activations, DEFAULT.parameters)
        experts = Experts(jax.random.key(1), (E, D, 7), "relu")
        decision = TokenChoice(jnp.zeros((G, S, K), jnp.int32), jnp.ones((G, S, K)))
        with pytest.raises(Seen) as seen:
            RaggedAllToAll(SlotRule(1), rules, kernel)(experts, jnp.ones((G, S, D)), decision)
        return seen.value.args[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KERNELS, "megablox", Megablox(interpret=True))
        assert [checked(name) for name in ("auto", "blocks", "ragged_dot", "megablox")] == [True, True, True, False]
