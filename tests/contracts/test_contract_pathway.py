"""Routers that see the logits of the sparse layer before: what flows through a model, however it is run."""

from __future__ import annotations

import dataclasses
import functools

import cases
import decoders
import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import decoder_config

from sparse_lm.config import ConfigError
from sparse_lm.models.block import Context
from sparse_lm.models.config import DepthConfig, ModelConfig
from sparse_lm.models.decoder import Decoder, build_decoder
from sparse_lm.moe.attention.mixture import Mixture
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.moe.types import Replay
from sparse_lm.nn.attend import row_sight
from sparse_lm.sharding import DEFAULT


def config(router=None, layers=None, **moe) -> ModelConfig:
    """A dense layer, then three sparse ones, with two experts that the router may choose beside the eight."""
    options = {"priority": "token", "num_copy": 1, "num_constant": 1, "free_share": 0.5, **moe}
    router = router or TopK(init_scale=cases.ROUTER_SCALE, pathway=True)
    return decoder_config(
        cases.moe(2, router, **{"first_dense": 1, "every": 1, **options}), **{"num_layers": 4, **(layers or {})}
    )


@functools.cache
def model(one: ModelConfig) -> Decoder:
    """With weights on the pathway, which start at 0."""

    def moved(path, leaf):
        name = jax.tree_util.keystr(path)
        return jax.random.normal(jax.random.key(len(name)), leaf.shape) if "pathway" in name else leaf

    return jax.tree_util.tree_map_with_path(moved, build_decoder(jax.random.key(0), one, DEFAULT))


def tokens() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, segments and positions without padding."""
    tokens_BL = jnp.asarray(np.random.default_rng(1).integers(0, decoders.VOCAB, (4, 8)))
    return tokens_BL, jnp.ones_like(tokens_BL), jnp.broadcast_to(jnp.arange(8), (4, 8))


@pytest.mark.parametrize(
    "grouping", [{}, pytest.param({"grouping": "position", "group_size": 2}, marks=pytest.mark.slow)]
)
def test_the_logits_flow_from_layer_to_layer(grouping):
    """Layer by layer in float64: G_1 = x W, then G_j = x W + G_{j-1} W_g; choices and gates are those of G_j."""
    one = model(config(**grouping))
    tokens_BL, segments_BL, positions_BL = tokens()
    _, reports = one(tokens_BL, segments_BL, positions_BL, replay=Replay(record=True))
    assert reports.feed_forward is not None and reports.feed_forward.carried_BLE is None
    recorded = reports.feed_forward.decision
    assert recorded is not None

    context = Context(tokens_BL, positions_BL, row_sight(segments_BL), segments_BL > 0)
    x_BLD = one.embedding.encode(tokens_BL, jnp.float32)
    blocks = [
        jax.tree.map(lambda leaf, i=i: leaf[i], unit)
        for unit, (repeats, _) in zip(one.stack.units, one.stack.plan, strict=True)
        for i in range(repeats)
    ]
    carried_BLE, number = np.zeros((4, 8, 10)), 0
    for unit in blocks:
        (block,) = unit.blocks
        y_BLD, _ = block.attention(block.attention_norm(x_BLD), positions_BL, context.sight, None, None)
        inputs_BLD = np.asarray(block.feed_forward_norm(x_BLD + y_BLD), np.float64)
        x_BLD, report, _ = block(
            x_BLD, dataclasses.replace(context, carried_BLE=jnp.asarray(carried_BLE, jnp.float32)), None
        )
        if report.feed_forward is None:
            continue
        scores = block.feed_forward.router.scores
        added_BLE = carried_BLE @ np.asarray(scores.pathway_KE[...], np.float64)
        assert number == 0 or np.abs(added_BLE).max() > 1
        carried_BLE = inputs_BLD @ np.asarray(scores.weight_DE[...], np.float64) + added_BLE
        np.testing.assert_allclose(report.feed_forward.carried_BLE, carried_BLE, rtol=1e-3, atol=1e-3)
        expert_BLK = np.argsort(-carried_BLE, axis=-1)[..., :2]
        got_GSK = np.asarray(recorded.expert_GSK[number])
        if grouping:
            got_GSK = got_GSK.reshape(2, 8, 2, 2).swapaxes(1, 2)
        np.testing.assert_array_equal(got_GSK.reshape(expert_BLK.shape), expert_BLK)
        number += 1
    assert number == 3


def test_generation_equals_the_whole_pass():
    one = model(config(capacity_factor_eval=None))
    tokens_BL, segments_BL, positions_BL = tokens()
    whole_BLV, _ = one(tokens_BL, segments_BL, positions_BL)
    cache, parts = one.empty_cache(4, 8), []
    for start, stop in ((0, 5), (5, 6), (6, 8)):
        logits_BLV, cache = one.extend(
            tokens_BL[:, start:stop], segments_BL, positions_BL[:, start:stop], jnp.asarray(start), cache
        )
        parts.append(logits_BLV)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole_BLV, rtol=1e-4, atol=1e-5)


@functools.cache
def reference() -> decoders.Trajectory:
    """Two steps, after the first of which the pathway has weights, looped over without recomputation."""
    (one,) = decoders.train(config(layers={"scan_layers": False}), None)
    moved = [value for name, value in one.state.items() if name.endswith("pathway_KE/value") and "model" in name]
    assert len(moved) == 1 and np.abs(moved[0][1:]).max() > 1e-4
    assert not moved[0][0].any()  # the first sparse layer has nothing before it
    return one


def assert_same(got: decoders.Trajectory):
    expected = reference()
    assert got.state.keys() == expected.state.keys()
    for name, value in expected.state.items():
        np.testing.assert_allclose(got.state[name], value, rtol=2e-4, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(got.metrics["total"], expected.metrics["total"], rtol=1e-5)


@pytest.mark.parametrize(
    ("layers", "accumulate"),
    [
        ({"remat": "full"}, 2),
        pytest.param({}, 1, marks=pytest.mark.slow),
        pytest.param({"remat": "dots", "scan_layers": False}, 1, marks=pytest.mark.slow),
    ],
)
def test_scan_remat_and_accumulation_change_nothing(layers, accumulate):
    (got,) = decoders.train(config(layers=layers), None, accumulate)
    assert_same(got)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "data2-expert4" else pytest.mark.slow)
        for name in cases.MESHES
        if name != "one"
    ],
)
def test_every_mesh_trains_alike(name, mesh_of):
    """Ten experts to choose from on 8, 4 and 2 devices: the router's weights need not be cut evenly."""
    dispatcher = "all_to_all" if "expert" in name else "gather"
    (got,) = decoders.train(config(dispatcher=dispatcher), mesh_of(**cases.MESHES[name]))
    assert_same(got)


def test_without_the_option_nothing_is_carried():
    plain = config(router=TopK(init_scale=cases.ROUTER_SCALE))
    assert not any("pathway" in name for name in decoders.flat(build_decoder(jax.random.key(0), plain, DEFAULT)))
    fresh = config()  # its pathway weighs 0, so that the model is the same
    arrays = tokens()
    with harness.on_mesh(None):
        models = [build_decoder(jax.random.key(0), one, DEFAULT) for one in (plain, fresh)]
        without_BLV, with_BLV = (one(*arrays)[0] for one in models)
        np.testing.assert_array_equal(without_BLV, with_BLV)


def test_refusals():
    with pytest.raises(ConfigError, match="pathway=False or depth=None"):
        decoder_config(cases.moe(2, {"pathway": True}), depth=DepthConfig(allow_non_causal=True))
    with pytest.raises(ConfigError, match="only routers of feed-forward layers"):
        Mixture(router=TopK(pathway=True))
