"""Dropless expert parallelism: its table of traffic by hand, every load on a mesh, and who may not be cut."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.moe.dispatch.dense import Dense
from sparse_lm.moe.dispatch.ragged_all_to_all import RaggedAllToAll, Traffic
from sparse_lm.moe.experts import Experts
from sparse_lm.moe.grouped import KERNELS, Layout
from sparse_lm.moe.grouped.megablox import Megablox
from sparse_lm.moe.slots import SlotRule
from sparse_lm.moe.types import TokenChoice
from sparse_lm.sharding import DEFAULT

G, S, E, D, K = 4, 6, 4, 5, 2
RNG = np.random.default_rng(0)
LOADS = {
    "mixed": np.stack([RNG.permutation(E)[:K] for _ in range(G * S)]).reshape(G, S, K),
    "one_device": np.broadcast_to([2, 3], (G, S, K)),
    "one_expert": np.broadcast_to([1, -1], (G, S, K)),
    "nobody": np.full((G, S, K), -1),
}


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


@functools.partial(jax.jit, static_argnums=(0, 1))
@functools.partial(jax.value_and_grad, argnums=(2, 3, 4), has_aux=True)
def total(dispatcher, gate_on, experts, x_GSD, gate_GSK, expert_GSK):
    gate_GSK = jnp.where(expert_GSK >= 0, gate_GSK, 0.0)
    y_GSD, kept_GSK = dispatcher(experts, x_GSD, TokenChoice(expert_GSK, gate_GSK, gate_on=gate_on))
    return jnp.sum(jnp.sin(y_GSD)), (y_GSD, kept_GSK)


def with_gradients(dispatcher, mesh, expert_GSK, gate_on="output"):
    """Output, what was kept, and the gradients of experts, tokens and gates; compiled once for all loads."""
    with jax.set_mesh(mesh):
        experts = DEFAULT.shard_parameters(Experts(jax.random.key(1), (E, D, 7), "swiglu", bias=True))
        x_GSD = DEFAULT.constrain(jax.random.normal(jax.random.key(0), (G, S, D)), "GSD")
        expert_GSK = DEFAULT.constrain(jnp.asarray(expert_GSK, jnp.int32), "GSK")
        gate_GSK = DEFAULT.constrain(jax.random.uniform(jax.random.key(2), (G, S, K)), "GSK")
        (_, (y_GSD, kept_GSK)), gradients = total(dispatcher, gate_on, experts, x_GSD, gate_GSK, expert_GSK)
        return jax.tree.map(np.asarray, (y_GSD, kept_GSK, gradients))


@pytest.fixture(scope="module")
def mesh(mesh_of):
    return mesh_of(data=2, expert=2)


@pytest.mark.parametrize("name", LOADS)
def test_every_load_is_served_whole_on_a_mesh(name, mesh):
    got = with_gradients(RaggedAllToAll(SlotRule(1), DEFAULT), mesh, LOADS[name])
    expected = with_gradients(Dense(SlotRule(S), DEFAULT), mesh, LOADS[name])
    np.testing.assert_array_equal(got[1], LOADS[name] >= 0)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("kernel", ["ragged_dot", "megablox"])
def test_every_kernel_on_a_mesh(kernel, mesh, monkeypatch):
    monkeypatch.setitem(KERNELS, "megablox", Megablox(interpret=True))
    blocks = RaggedAllToAll(SlotRule(1), DEFAULT)
    got = with_gradients(RaggedAllToAll(SlotRule(1), DEFAULT, kernel), mesh, LOADS["mixed"], "input")
    expected = with_gradients(blocks, mesh, LOADS["mixed"], "input")
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


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
