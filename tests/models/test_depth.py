"""A block that tokens may skip: against float64 loops, its gradients, its counts, and what the predictor may touch."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import depth_oracle
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm.config import ConfigError
from sparse_lm.models.block import Context
from sparse_lm.models.config import DepthConfig, LayerKind, ModelConfig
from sparse_lm.models.depth import Depth, add_at, choose, routed_tokens, take
from sparse_lm.moe.config import MoEConfig
from sparse_lm.nn.attend import row_sight
from sparse_lm.sharding import DEFAULT

BATCH, LENGTH, WIDTH = 3, 10, 8
SEGMENTS_BL = np.array([[1] * 10, [1, 1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]])
POSITIONS_BL = np.array([range(10), [0, 1, 2, 3, 0, 1, 2, 3, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]])
X_BLD = np.random.default_rng(0).normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
TARGET_BLD = np.random.default_rng(1).normal(size=X_BLD.shape).astype(np.float32)
DEPTH = DepthConfig(capacity=0.4, every=1, hidden=5)  # 4 of 10 tokens; the last row has only two real ones
MOE = MoEConfig(num_experts=4, top_k=2, every=1, capacity_factor=None, capacity_factor_eval=None)


def context(segments=SEGMENTS_BL) -> Context:
    segments_BL = jnp.asarray(segments)
    ids_BL = jnp.arange(segments.size).reshape(segments.shape)
    sight = row_sight(segments_BL)
    return Context(ids_BL, jnp.asarray(POSITIONS_BL), sight, real_BL=segments_BL > 0)


def build(predictor: str = "router", moe: MoEConfig | None = None, **options: Any) -> Depth:
    config = ModelConfig(
        num_layers=1, d_model=WIDTH, num_heads=4, num_kv_heads=2, d_ff=8, moe=moe,
        depth=dataclasses.replace(DEPTH, predictor=predictor), **options,
    )  # fmt: skip
    block = Depth(jax.random.key(0), config, LayerKind(moe is not None), DEFAULT)
    if block.predictor is not None:
        block.predictor.bias_F[...] = jnp.linspace(-0.5, 0.5, 5)
    return block


def named(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    short = (name.removesuffix("/value").removeprefix("block/") for name in names)
    return {name: np.asarray(leaf, np.float64) for name, (_, leaf) in zip(short, leaves, strict=True)}


def problem(predictor: str) -> depth_oracle.Problem:
    weights = named(nnx.state(build(predictor), nnx.Param))
    return depth_oracle.Problem(weights, X_BLD.astype(np.float64), SEGMENTS_BL, POSITIONS_BL, slots=4)


def objective(answer: depth_oracle.Answer) -> float:
    """A loss that sees the output and the predictor."""
    return float(np.sum(answer.y_BLD * TARGET_BLD) + 3.0 * answer.nats)


@functools.cache
def run(predictor: str, training: bool):
    """((objective, (y, stats)), gradients) of the package."""
    graph, parameters, rest = nnx.split(build(predictor), nnx.Param, ...)

    def loss(parameters, x_BLD):
        key = jax.random.key(2) if training else None
        y_BLD, reports, cache = nnx.merge(graph, parameters, rest)(x_BLD, context(), key)
        assert cache is None and reports.feed_forward is None and reports.depth is not None
        return jnp.sum(y_BLD * TARGET_BLD) + 3.0 * reports.depth.loss, (y_BLD, reports.depth)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(parameters, jnp.asarray(X_BLD))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("predictor", ["router", "mlp"])
def test_one_token_at_a_time(predictor, training):
    (loss, (y_BLD, stats)), _ = run(predictor, training)
    expected = depth_oracle.block(problem(predictor), training)
    np.testing.assert_allclose(y_BLD, expected.y_BLD, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(loss, objective(expected), rtol=1e-5)
    real_BL = SEGMENTS_BL > 0
    processed_BL = expected.chosen_BL if training else expected.says_BL
    assert int(stats.chosen) == expected.chosen_BL.sum() == 4 + 4 + 2
    assert int(stats.processed) == processed_BL.sum()
    assert int(stats.agreed) == ((expected.says_BL == expected.chosen_BL) & real_BL).sum()
    assert int(stats.processed + stats.skipped) == real_BL.sum()
    assert int(stats.processed + stats.skipped + stats.padding) == real_BL.size
    assert 0 < expected.says_BL.sum() < real_BL.sum()
    assert not np.array_equal(expected.says_BL, expected.chosen_BL)
    untouched = ~processed_BL
    np.testing.assert_array_equal(np.asarray(y_BLD)[untouched], X_BLD[untouched])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("predictor", ["router", "mlp"])
def test_gradients_are_those_of_the_literal_program(predictor, training):
    """By central differences in float64 along random directions; decisions are constant around almost all points."""
    _, (d_weights, d_x) = run(predictor, training)
    point, step, rng = problem(predictor), 1e-6, np.random.default_rng(5)
    for name, gradient in {**named(d_weights), "x": np.asarray(d_x)}.items():
        direction, losses = rng.normal(size=gradient.shape), []
        for sign in (1, -1):
            change = sign * step * direction
            if name != "x":
                moved = dataclasses.replace(point, weights={**point.weights, name: point.weights[name] + change})
            else:
                # The second kind of predictor sees the tokens without a gradient.
                moved = dataclasses.replace(point, x_BLD=point.x_BLD + change)
            answer = depth_oracle.block(moved, training)
            if name == "x" and predictor == "mlp":
                answer = dataclasses.replace(answer, nats=0.0)
            losses.append(objective(answer))
        slope = (losses[0] - losses[1]) / (2 * step)
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=2e-4, atol=2e-4, err_msg=name)


def test_the_highest_real_tokens_are_chosen_in_the_order_of_the_row():
    weight_BL = jnp.asarray([[5.0, 1.0, 3.0, 3.0, 3.0, 9.0], [0.0, -1.0, 7.0, 7.0, 7.0, 7.0]])
    real_BL = jnp.asarray([[True] * 5 + [False], [True, True] + [False] * 4])
    chosen_BL, index_BC = choose(weight_BL, real_BL, 3)
    # The earlier of equal tokens; not the padding, however high; with two real tokens one place is padding.
    np.testing.assert_array_equal(chosen_BL, [[1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(index_BC, [[0, 2, 3], [0, 1, 2]])


@hypothesis.given(st.integers(1, 6), st.integers(0, 2**16))
@hypothesis.settings(max_examples=10)
def test_what_is_taken_can_be_put_back(slots, seed):
    rng = np.random.default_rng(seed)
    x_BLD = jnp.asarray(rng.normal(size=(2, 6, 3)).astype(np.float32))
    index_BC = jnp.asarray([np.sort(rng.permutation(6)[:slots]) for _ in range(2)])
    taken_BCD = take(x_BLD, index_BC)
    for row in range(2):
        np.testing.assert_array_equal(taken_BCD[row], x_BLD[row][index_BC[row]])
    back = add_at(x_BLD, -taken_BCD, index_BC)
    np.testing.assert_allclose(jnp.sum(jnp.abs(back)) + jnp.sum(jnp.abs(taken_BCD)), jnp.sum(jnp.abs(x_BLD)), rtol=1e-5)


@pytest.mark.parametrize(
    ("capacity", "length", "slots"), [(0.125, 128, 16), (0.125, 100, 13), (0.1, 30, 3), (1e-3, 9, 1)]
)
def test_slots_are_rounded_up(capacity, length, slots):
    assert DepthConfig(capacity=capacity).slots(length) == slots


@pytest.mark.parametrize("key", [None, jax.random.key(1)], ids=["evaluation", "training"])
def test_with_weight_one_everywhere_it_is_the_block(key):
    block = build(moe=MOE)
    block.options = dataclasses.replace(DEPTH, capacity=1.0)
    x_BLD = jnp.asarray(X_BLD).at[..., 0].set(1.0)
    block.weight_D[...] = jnp.zeros(WIDTH).at[0].set(1.0)
    got, reports, _ = block(x_BLD, context(), key)
    expected, inner, _ = block.block(x_BLD, context(), key)
    real_BL = SEGMENTS_BL > 0
    np.testing.assert_allclose(got[real_BL], expected[real_BL], rtol=1e-5, atol=1e-5)
    assert reports.feed_forward is not None and inner.feed_forward is not None
    np.testing.assert_array_equal(reports.feed_forward.router.load_UE, inner.feed_forward.router.load_UE)


def test_experts_inside_see_the_tokens_that_take_part_and_no_other():
    block = build(moe=MOE)
    for key, places in ((jax.random.key(1), BATCH * 4), (None, BATCH * LENGTH)):
        _, reports, _ = block(jnp.asarray(X_BLD), context(), key)
        assert reports.feed_forward is not None and reports.depth is not None
        router, processed = reports.feed_forward.router, int(reports.depth.processed)
        assert int(router.tokens_U.sum()) == processed
        assert int(router.load_UE.sum()) == 2 * processed
        assert int((router.tokens_U + router.padding_U).sum()) == places


def test_experts_inside_compute_what_they_would_for_these_tokens_alone():
    block = build(moe=MOE)
    y_BLD, _, _ = block(jnp.asarray(X_BLD), context(), jax.random.key(1))
    weight_BL = X_BLD @ np.asarray(block.weight_D[...])
    places = np.sort(np.argsort(-weight_BL[0])[:4])
    segments = jnp.ones((1, 4), jnp.int32)
    alone = Context(jnp.asarray(places)[None], jnp.asarray(POSITIONS_BL[:1, places]), row_sight(segments), segments > 0)
    inner_BCD, _, _ = block.block(jnp.asarray(X_BLD[:1, places]), alone, None)
    expected = X_BLD[0, places] + weight_BL[0, places, None] * (inner_BCD[0] - X_BLD[0, places])
    np.testing.assert_allclose(y_BLD[0, places], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("predictor", ["router", "mlp"])
def test_what_the_loss_of_the_predictor_teaches(predictor):
    """The router's own weight and the tokens, or the network beside it alone."""
    graph, parameters, rest = nnx.split(build(predictor), nnx.Param, ...)

    def loss(parameters, x_BLD):
        reports = nnx.merge(graph, parameters, rest)(x_BLD, context(), jax.random.key(2))[1]
        assert reports.depth is not None
        return reports.depth.loss

    d_weights, d_x = jax.grad(loss, (0, 1))(parameters, jnp.asarray(X_BLD))
    taught = {name for name, value in named(d_weights).items() if np.any(value)}
    expected = {"weight_D"} if predictor == "router" else {f"predictor/{x}" for x in ("up_DF", "bias_F", "down_F")}
    assert taught == expected
    assert np.any(d_x) == (predictor == "router")


def test_where_the_predictor_is_right_evaluation_is_training():
    block = build()
    x_BLD = np.array(X_BLD)
    weight_BL = x_BLD @ np.asarray(block.weight_D[...])
    direction = np.asarray(block.weight_D[...]) / np.sum(np.square(block.weight_D[...]))
    chosen_BL, _ = choose(jnp.asarray(weight_BL), context().real_BL, 4)
    wanted_BL = np.where(chosen_BL, np.abs(weight_BL) + 0.1, -np.abs(weight_BL) - 0.1)
    x_BLD += (wanted_BL - weight_BL)[..., None] * direction
    trained, reports, _ = block(jnp.asarray(x_BLD), context(), jax.random.key(1))
    evaluated, _, _ = block(jnp.asarray(x_BLD), context(), None)
    np.testing.assert_allclose(evaluated, trained, rtol=1e-4, atol=1e-5)
    assert reports.depth is not None and int(reports.depth.agreed) == (SEGMENTS_BL > 0).sum()


def test_bfloat16_keeps_its_type_and_decides_in_float32():
    y_BLD, reports, _ = build()(jnp.asarray(X_BLD, jnp.bfloat16), context(), jax.random.key(1))
    assert y_BLD.dtype == jnp.bfloat16
    assert reports.depth is not None and reports.depth.loss.dtype == jnp.float32
    np.testing.assert_allclose(y_BLD.astype(jnp.float32), run("router", True)[0][1][0], atol=0.15)


def test_routed_tokens_by_hand():
    """Layers: dense, wrapped dense, sparse, wrapped sparse. 10, 8 and 2 real tokens, of which at most 4 are chosen."""
    moe = dataclasses.replace(MOE, first_dense=2)
    config = ModelConfig(num_layers=4, moe=moe, depth=dataclasses.replace(DEPTH, every=2))
    real_BL = jnp.asarray(SEGMENTS_BL > 0)
    np.testing.assert_array_equal(routed_tokens(config, real_BL), [20, 10])
    assert routed_tokens(config.replace(moe=None), real_BL).shape == (0,)


def test_refusals():
    with pytest.raises(ConfigError, match=r"depth\.every=3.*no layer of 2"):
        ModelConfig(num_layers=2, depth=DepthConfig(every=3))
    with pytest.raises(ConfigError, match=r"moe\.group_size=4.*leave it at None"):
        ModelConfig(num_layers=2, moe=MoEConfig(every=2, group_size=4), depth=DepthConfig())
    ModelConfig(num_layers=4, moe=MoEConfig(every=2, first_dense=1, group_size=4), depth=DepthConfig())
    for capacity in (0.0, 1.5):
        with pytest.raises(ConfigError, match="capacity"):
            DepthConfig(capacity=capacity)
