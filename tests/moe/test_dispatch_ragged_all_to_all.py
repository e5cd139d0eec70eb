"""Dropless expert parallelism: every load on a mesh, in as many windows as it takes, and who may not be cut."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from dispatch_cases import LOADS, D, E, G, K, S, assert_close, with_gradients

from sparse_lm.experiment import resolved
from sparse_lm.moe.dispatch.dense import Dense
from sparse_lm.moe.dispatch.dropless import Dropless
from sparse_lm.moe.dispatch.ragged_all_to_all import RaggedAllToAll
from sparse_lm.moe.experts import Experts
from sparse_lm.moe.grouped import KERNELS
from sparse_lm.moe.grouped.megablox import Megablox
from sparse_lm.moe.grouped.triton import Triton
from sparse_lm.moe.slots import SlotRule
from sparse_lm.moe.types import TokenChoice
from sparse_lm.planning.plan import abstract_state, trace_step
from sparse_lm.sharding import DEFAULT


@pytest.fixture(scope="module")
def mesh(mesh_of):
    return mesh_of(data=2, expert=2)


@pytest.mark.parametrize("name", LOADS)
def test_every_load_is_served_whole_on_a_mesh(name, mesh):
    got = with_gradients(RaggedAllToAll(SlotRule(1), DEFAULT), mesh, LOADS[name])
    expected = with_gradients(Dense(SlotRule(S), DEFAULT), mesh, LOADS[name])
    np.testing.assert_array_equal(got[1], LOADS[name] >= 0)
    assert_close(got, expected)


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize(("room", "sizes"), [(0.4, {"data": 2, "expert": 2}), (1.0, {"expert": 4, "model": 2})])
def test_further_windows_change_neither_results_nor_gradients(room, sizes, name, mesh_of):
    widths = (E, D, 8)
    windows = RaggedAllToAll(SlotRule(1), DEFAULT, exchange_room=room)
    got = with_gradients(windows, mesh_of(**sizes), LOADS[name], sizes=widths, dropout=0.3)
    expected = with_gradients(Dense(SlotRule(S), DEFAULT), None, LOADS[name], sizes=widths, dropout=0.3)
    np.testing.assert_array_equal(got[1], LOADS[name] >= 0)
    assert_close(got, expected)


def test_further_windows_in_chunks_with_copies_and_replicas(mesh_of):
    six = np.where(LOADS["one_device"] == 2, 5, LOADS["mixed"])
    for sizes, copies in (((6, D, 8), 0), ((8, D, 8), 1)):
        how = {"exchange_chunks": 2, "hot_copies": copies, "exchange_room": 0.5}
        got = with_gradients(RaggedAllToAll(SlotRule(1), DEFAULT, **how), mesh_of(data=2, expert=4), six, sizes=sizes)
        assert_close(got, with_gradients(Dense(SlotRule(S), DEFAULT), None, six, sizes=sizes))


@pytest.mark.parametrize("room", [0.4, 2.0])
@pytest.mark.parametrize("kernel", ["ragged_dot", "megablox", "triton"])
def test_every_kernel_on_a_mesh(kernel, room, mesh, monkeypatch):
    monkeypatch.setitem(KERNELS, "megablox", Megablox(interpret=True))
    monkeypatch.setitem(KERNELS, "triton", Triton(interpret=True))
    blocks = RaggedAllToAll(SlotRule(1), DEFAULT)
    windows = RaggedAllToAll(SlotRule(1), DEFAULT, kernel, exchange_room=room)
    got = with_gradients(windows, mesh, LOADS["mixed"], "input")
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


@pytest.mark.parametrize("cls", [Dropless, RaggedAllToAll])
def test_what_differs_between_gpus_is_declared(cls, mesh, monkeypatch):
    monkeypatch.setattr(Triton, "refusal", lambda self, platform: None)
    experts = Experts(jax.random.key(1), (E, D, 8), "swiglu")

    def total(x_GSD, experts, expert_GSK):
        decision = TokenChoice(expert_GSK, DEFAULT.constrain(jnp.ones(expert_GSK.shape), "GSK"))
        return jnp.sum(cls(SlotRule(1), DEFAULT, "triton")(experts, x_GSD, decision)[0])

    with jax.set_mesh(mesh):
        expert_GSK = DEFAULT.constrain(jnp.asarray(LOADS["mixed"], jnp.int32), "GSK")
        arguments = DEFAULT.constrain(jnp.ones((G, S, D)), "GSD"), DEFAULT.shard_parameters(experts), expert_GSK
        traced = jax.jit(jax.grad(total, (0, 1))).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "check_vma=True" in str(traced.jaxpr) and "check_vma=False" not in str(traced.jaxpr)
    assert text.count("__gpu$xla.gpu.triton") == 2 + 2 * 3  # of a sum: the last product itself is not needed


@pytest.mark.parametrize(
    ("dispatcher", "remat", "sizes"),
    [("dropless", "full", {"model": 2}), ("ragged_all_to_all", "save:expert_hidden", {"expert": 2})],
)
def test_a_train_step_lowers_for_gpus(dispatcher, remat, sizes, mesh_of, monkeypatch):
    """With loops over layers and rematerialisation, which trace the kernels again."""
    monkeypatch.setattr(Triton, "refusal", lambda self, platform: None)
    moe = {"dispatcher": dispatcher, "grouped": "triton", "capacity_factor": None, "capacity_factor_eval": None}
    changes = {f"model__moe__{name}": value for name, value in moe.items()}
    changes |= {f"mesh__{axis}": size for axis, size in sizes.items()}
    config = resolved(tiny.experiment(model__num_layers=4, model__remat=remat, mesh__data=2, **changes), 16)
    with jax.set_mesh(mesh := mesh_of(data=2, **sizes)):
        traced = trace_step(config, abstract_state(config, mesh), mesh)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "check_vma=False" not in str(traced.jaxpr)
    assert text.count("__gpu$xla.gpu.triton") >= 9  # three products, and two gradients of each
