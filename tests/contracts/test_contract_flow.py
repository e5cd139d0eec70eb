"""Who learns from what, and who sees whom: gradient flow, causality, documents, padding, permutation, determinism.

Each guard of the configuration is shown to be needed: without it the contract breaks.
"""

from __future__ import annotations

import dataclasses
import itertools

import cases
import decoders
import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import causal_moe, decoder_config
from flax import nnx

from sparse_lm.config import ConfigError
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.sharding import DEFAULT

# The router learns from the task


def task_gradient(case: cases.Case) -> np.ndarray:
    """Gradient with respect to the router's weights of a loss that sees the layer's output alone."""
    x_BLD, mask_BL = harness.inputs()
    graph, parameters, rest = nnx.split(harness.build(case), nnx.Param, ...)
    target_BLD = np.random.default_rng(5).normal(size=x_BLD.shape).astype(np.float32)

    @jax.jit
    def gradient(parameters):
        def loss(parameters):
            key = jax.random.key(0) if case.training else None
            y_BLD, _ = nnx.merge(graph, parameters, rest)(jnp.asarray(x_BLD), jnp.asarray(mask_BL), key)
            return jnp.sum(y_BLD * target_BLD)

        return jax.grad(loss)(parameters)

    grads = nnx.to_pure_dict(gradient(parameters))
    router = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads["router"])])
    return router / np.abs(grads["experts"]["down_EFD"]).max()


@pytest.mark.parametrize("name", [name for name in cases.ROUTER_CASES if not name.startswith("hash")])
def test_the_loss_of_the_task_reaches_the_router(name):
    assert np.abs(task_gradient(cases.ROUTER_CASES[name])).max() > 1e-3


UNGUARDED = {
    "softmax_after": (1, {"gate": "softmax_after"}),
    "before_drop": (1, {"renormalise": "before_drop"}),
    "after_drop": (1, {"renormalise": "after_drop"}),
    "first_only": (2, {"second_expert": "none", "renormalise": "after_drop"}),
}


@pytest.mark.parametrize("name", UNGUARDED)
def test_what_the_configuration_refuses_would_teach_the_router_nothing(name, monkeypatch):
    top_k, router = UNGUARDED[name]
    with pytest.raises(ConfigError, match="the router learns nothing"):
        cases.moe(top_k, router)
    monkeypatch.setattr(TopK, "check_shape", lambda self, shape: None)
    assert np.abs(task_gradient(cases.Case(cases.moe(top_k, router)))).max() < 1e-6


# Causality


def earlier_changes(moe, training: bool) -> int:
    """See `decoders.earlier_changes`, of a model with these sparse layers."""
    return decoders.earlier_changes(decoder_config(moe), training)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("top_k", "priority"), [(1, "first_choice"), (2, "token")])
def test_no_earlier_token_sees_a_later_one(top_k, priority, training):
    moe = causal_moe(top_k, priority=priority, expert_dropout=0.2)
    assert moe.causal
    assert earlier_changes(moe, training) == 0


@pytest.mark.parametrize(
    ("options", "training"),
    [
        ({"top_k": 1, "priority": "probability"}, True),
        ({"top_k": 2, "priority": "first_choice"}, True),
        ({"top_k": 1, "priority": "batch"}, True),
        ({"top_k": 1, "priority": "random"}, True),
        ({"top_k": 2, "priority": "probability", "capacity_factor": None}, False),
    ],
    ids=["probability", "first_choice", "batch", "random", "evaluation"],
)
def test_what_counts_as_not_causal_does_see_later_tokens(options, training):
    moe = causal_moe(**options)
    assert not moe.causal
    assert earlier_changes(moe, training) > 0
    model = decoder_config(moe)
    with pytest.raises(ConfigError, match=r"model\.moe\.priority=.*not causal.*allow_non_causal=True"):
        Experiment(model=model, data=DataConfig(length=decoders.LENGTH))
    accepted = model.replace(moe__allow_non_causal=True)
    assert Experiment(model=accepted, data=DataConfig(length=decoders.LENGTH)).model == accepted


# Documents and padding


@pytest.fixture(scope="module")
def two_documents():
    """(logits of a model that drops nothing, tokens, segments, positions); each row has documents of 3 and 5."""
    logits = decoders.forward(decoder_config(causal_moe(capacity_factor=None)), True)
    tokens = np.random.default_rng(8).integers(0, decoders.VOCAB, (decoders.ROWS, 8))
    segments = np.broadcast_to([1, 1, 1, 2, 2, 2, 2, 2], tokens.shape)
    positions = np.broadcast_to([0, 1, 2, 0, 1, 2, 3, 4], tokens.shape)
    return logits, tokens, segments, positions


def test_documents_of_a_row_do_not_see_each_other(two_documents):
    logits, tokens, segments, positions = two_documents
    before = logits(tokens, segments, positions)
    other = tokens.copy()
    other[:, :3] = (other[:, :3] + 1) % decoders.VOCAB
    after = logits(other, segments, positions)
    assert after[:, 3:].tobytes() == before[:, 3:].tobytes()
    assert np.all(np.any(after[:, :3] != before[:, :3], axis=-1))
    joined = logits(tokens, np.ones_like(segments), positions)
    assert np.any(joined[:, 3:] != before[:, 3:])


def test_what_stands_in_the_padding_changes_nothing():
    logits = decoders.forward(decoder_config(causal_moe(2, num_shared=1)), True)
    batch = decoders.host_batch()
    arrays = [np.asarray(x)[:, 1:] for x in (batch.tokens_BL, batch.segments_BL, batch.positions_BL)]
    real = arrays[1] > 0
    before = logits(*arrays)
    after = logits(np.where(real, arrays[0], decoders.VOCAB - 1), arrays[1], np.where(real, arrays[2], 5))
    assert not real.all()
    assert after[real].tobytes() == before[real].tobytes()
    assert np.all(np.isfinite(after))


# Symmetry and repetition


@pytest.mark.parametrize("dispatcher", cases.DISPATCHERS)
def test_the_order_of_the_experts_does_not_matter(dispatcher):
    case = cases.dispatched(cases.ROUTER_CASES["top2_after_drop"], dispatcher)
    order = np.random.default_rng(9).permutation(8)
    x_BLD, mask_BL = (jnp.asarray(value) for value in harness.inputs())
    layer = harness.build(case)
    graph, state = nnx.split(layer)

    def permuted(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf[:, order] if "weight_DE" in name else leaf[order] if "_E" in name else leaf

    run = jax.jit(lambda state: nnx.merge(graph, state)(x_BLD, mask_BL, jax.random.key(0)))
    y_BLD, stats = run(state)
    other_BLD, other = run(jax.tree_util.tree_map_with_path(permuted, state))
    assert harness.deviation(other_BLD, y_BLD) < 1e-6
    np.testing.assert_array_equal(other.router.load_UE, stats.router.load_UE[:, order])
    expected = dataclasses.replace(stats.dispatch, dropped_E=stats.dispatch.dropped_E[order])
    for one, two in zip(jax.tree.leaves(other.dispatch), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


@pytest.mark.parametrize("dispatcher", cases.DISPATCHERS)
def test_the_same_call_gives_the_same_bits(dispatcher):
    case = cases.dispatched(cases.ROUTER_CASES["top2"], dispatcher)
    first, second = (jax.tree.leaves(dataclasses.asdict(harness.run(case))) for _ in range(2))
    for one, two in itertools.zip_longest(first, second):
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


def test_parameters_are_stored_as_the_rules_say(mesh_of):
    with jax.set_mesh(mesh_of(fsdp=2, expert=2, model=2)):
        layer = DEFAULT.shard_parameters(harness.build(cases.ROUTER_CASES["top2"]))
        assert layer.experts.up_EDF[...].addressable_shards[0].data.shape == (4, 4, 4)
        assert layer.router.scores.weight_DE[...].addressable_shards[0].data.shape == (4, 4)
