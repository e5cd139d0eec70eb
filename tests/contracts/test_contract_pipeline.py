"""A model whose layers are cut into stages trains, evaluates and is stored as one whose layers are not."""

from __future__ import annotations

import functools
import math
from typing import Any

import cases
import decoders
import jax
import numpy as np
import pytest
from decoders import decoder_config
from test_contract_model import assert_accounted, assert_same

from sparse_lm.evals.perplexity import make_evaluate
from sparse_lm.models.config import DepthConfig, ModelConfig
from sparse_lm.models.decoder import build_decoder
from sparse_lm.moe.attention.switch_head import SwitchHead
from sparse_lm.moe.config import BalanceConfig
from sparse_lm.moe.routers.sigmoid import Sigmoid
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.optim.build import build_optimizer
from sparse_lm.optim.config import OptimConfig
from sparse_lm.planning.collectives import collectives
from sparse_lm.planning.hlo import parse
from sparse_lm.sharding import DEFAULT, abstract_sharded
from sparse_lm.train.accumulate import loss_and_gradients
from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.config import CheckpointConfig
from sparse_lm.train.state import create_state

NUMBER = 4  # microbatches


def staged(**options: Any) -> ModelConfig:
    """A dense layer, then four sparse ones that stages share: router biases, drops, jitter, dropout."""
    router = Sigmoid(bias_rate=0.05, init_scale=cases.ROUTER_SCALE)
    moe = cases.moe(2, router, **{"priority": "token", "first_dense": 1, **options})
    return decoder_config(moe, num_layers=5, dropout=0.1)


def variant(name: str) -> ModelConfig:
    """Models whose layers hand on or report something of their own."""
    if name == "pathway":
        return decoder_config(cases.moe(2, TopK(pathway=True), priority="token"), num_layers=4, remat="full")
    if name == "depth":
        depth = DepthConfig(capacity=0.5, every=2, allow_non_causal=True)
        return decoder_config(cases.moe(2, priority="token", every=2), num_layers=4, depth=depth, loss_chunk=5)
    assert name == "attention"
    experts = SwitchHead(num_experts=4, top_k=2, balance=BalanceConfig(load=0.01, z=0.001))
    options = {"position": "learned", "max_length": decoders.LENGTH, "tie_embeddings": False, "num_kv_heads": None}
    return decoder_config(None, num_layers=4, attention=experts, **options)


@functools.cache
def reference(config: ModelConfig) -> decoders.Trajectory:
    return decoders.train(config, None, accumulate=NUMBER)[0]


SLOW = {"stage2", "stage4-data2", "stage2-context2", "stage2-fsdp2-model2"}
MESHES = {
    "stage2": {"stage": 2},
    "stage4-data2": {"stage": 4, "data": 2},
    "stage2-data2-expert2": {"stage": 2, "data": 2, "expert": 2},
    "stage2-context2": {"stage": 2, "context": 2},
    "stage2-fsdp2-model2": {"stage": 2, "fsdp": 2, "model": 2},
}


@pytest.mark.parametrize("sizes", [pytest.param(m, marks=[pytest.mark.slow] * (m in SLOW)) for m in MESHES])
def test_training_is_the_same_with_stages(sizes, mesh_of, record_property):
    """Loss, metrics, drops, biases of routers and gradients (as momentum), after two steps."""
    config = staged(dispatcher="all_to_all" if "expert" in sizes else "gather")
    (got,) = decoders.train(config, mesh_of(**MESHES[sizes]), accumulate=NUMBER)
    expected = reference(staged())
    worst = max(assert_same(got.metrics, expected.metrics), assert_same(got.state, expected.state))
    record_property("worst", f"{worst:.2g}")
    assert_accounted(got.metrics, 2)
    biases = [value for path, value in got.state.items() if path.removesuffix("/value").endswith("bias_E")]
    assert biases and all(np.abs(bias).max(axis=-1).min() > 0 for bias in biases)


@pytest.mark.slow
def test_flights_of_microbatches_add_up(mesh_of):
    (got,) = decoders.train(staged(scope="sequence"), mesh_of(stage=2), accumulate=NUMBER, in_flight=2)
    assert_same(got.metrics, reference(staged(scope="sequence")).metrics)
    assert_same(got.state, reference(staged(scope="sequence")).state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pathway", "depth", "attention"])
def test_what_layers_hand_on_and_report_passes_the_stages(name, mesh_of):
    (got,) = decoders.train(variant(name), mesh_of(stage=2, data=2), accumulate=NUMBER)
    assert_same(got.metrics, reference(variant(name)).metrics)
    assert_same(got.state, reference(variant(name)).state)


def test_evaluation_is_the_same_with_stages(mesh_of):
    def evaluated():
        model = build_decoder(jax.random.key(0), staged(), DEFAULT)
        evaluate = make_evaluate(("one", "two"), NUMBER)
        return evaluate(model, [decoders.placed(decoders.host_batch())])

    with jax.set_mesh(mesh_of(stage=2)):
        got = evaluated()
    expected = evaluated()
    assert got.loss == pytest.approx(expected.loss, rel=1e-5)
    assert got.by_domain == pytest.approx(expected.by_domain, rel=1e-5)
    assert (got.targets, got.dropped_fraction) == (expected.targets, expected.dropped_fraction)
    assert got.max_violation == expected.max_violation


def test_checkpoints_do_not_depend_on_stages(mesh_of, tmp_path):
    """Written with stages and read without, and the other way round."""
    made_of = staged(), build_optimizer(OptimConfig(warmup_steps=1), 2), DEFAULT
    create = jax.jit(lambda key: create_state(key, *made_of))
    meshes, states = (mesh_of(stage=2, data=2), mesh_of(fsdp=2)), []
    for mesh in meshes:
        with jax.set_mesh(mesh):
            states.append(create(jax.random.key(0)))
    layers = states[0].model.stack.units[1].blocks[0].feed_forward.experts.up_EDF[...]
    assert layers.shape[0] == 4 and {shard.data.shape[0] for shard in layers.addressable_shards} == {2}
    moments = [leaf for leaf in jax.tree.leaves(states[0].optimizer) if leaf.shape == layers.shape]
    assert moments and all(leaf.sharding.shard_shape(leaf.shape)[0] == 2 for leaf in moments)
    for written, read in ((0, 1), (1, 0)):
        with Checkpoints(tmp_path / f"from{written}", CheckpointConfig(every=1)) as checkpoints:
            checkpoints.save(1, states[written], {})
            with jax.set_mesh(meshes[read]):
                abstract = abstract_sharded(jax.eval_shape(create, jax.random.key(0)), DEFAULT, meshes[read])
                restored, _ = checkpoints.restore(abstract)
        like = jax.tree.leaves(states[read])
        assert all(
            got.sharding.is_equivalent_to(one.sharding, one.ndim)
            for got, one in zip(jax.tree.leaves(restored), like, strict=True)
        )
        got, expected = decoders.flat(restored), decoders.flat(states[written])
        assert got.keys() == expected.keys()
        for path, value in expected.items():
            np.testing.assert_array_equal(got[path], value, err_msg=path)


def test_stages_exchange_activations_with_their_neighbours_alone(mesh_of):
    """Along `stage` no weights of layers move, and activations from one to the next."""
    config = decoder_config(cases.moe(2, priority="token"), num_layers=4, d_model=32)
    mesh = mesh_of(stage=2, data=2)
    with jax.set_mesh(mesh):
        model, batch = build_decoder(jax.random.key(0), config, DEFAULT), decoders.placed(decoders.host_batch())
        function = jax.jit(loss_and_gradients, static_argnums=(3, 4))
        compiled = function.lower(model, batch, jax.random.key(1), NUMBER, decoders.DOMAINS).compile()
    found = {(c.kind, c.axes): c.bytes for c in collectives(parse(compiled.as_text() or ""), dict(mesh.shape))}
    found = {key: number for key, number in found.items() if "stage" in key[1]}
    turns, activations = NUMBER + 2 - 1, math.prod((decoders.ROWS // NUMBER // 2, decoders.LENGTH, 32, 4))
    # Loads first, for the global scope, then losses: one activation onwards and one back in every turn, of which the
    # gradients are the same again.
    assert found.pop(("collective-permute", ("stage",))) == 3 * turns * 2 * activations
    # Weights outside of the stages are on all of them, and their gradients are summed, with a few numbers.
    outside = sum(leaf.nbytes for leaf in jax.tree.leaves((model.embedding, model.norm)))
    assert outside <= found.pop(("all-reduce", ("stage",))) < 1.1 * outside
    # What is left are statistics and losses.
    layers = sum(leaf.nbytes for leaf in jax.tree.leaves(model.stack))
    assert sum(found.values()) < layers / 2 / 5, found
