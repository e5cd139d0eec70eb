"""How layers are cut into equal units, and that running them by a scan or one by one is the same."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.models.block import Context
from sparse_lm.models.config import DepthConfig, LayerKind, ModelConfig
from sparse_lm.models.reports import Reports
from sparse_lm.models.stack import Stack, segments
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.layer import MoE
from sparse_lm.nn.attend import row_sight
from sparse_lm.nn.mlp import Mlp
from sparse_lm.sharding import DEFAULT

F, T = False, True


@pytest.mark.parametrize(
    ("sparse", "every", "expected"),
    [
        ((F, F, F), 1, [(3, (F,))]),
        ((T, T), 1, [(2, (T,))]),
        ((F, T, F, T), 2, [(2, (F, T))]),
        ((F, F, T, F, T, F), 2, [(1, (F,)), (2, (F, T)), (1, (F,))]),
        ((F, T, T), 1, [(1, (F,)), (2, (T,))]),
        ((F, F, T, F, F), 3, [(1, (F, F, T)), (2, (F,))]),
    ],
)
def test_segments_by_hand(sparse, every, expected):
    assert segments(sparse, every) == expected


@pytest.mark.parametrize(
    ("layers", "period", "expected"),
    [
        ("dwdwd", 2, [(2, "dw"), (1, "d")]),
        ("ddwdsw", 2, [(2, "d"), (1, "w"), (1, "d"), (1, "sw")]),
        ("dwsdwsdw", 3, [(2, "dws"), (1, "d"), (1, "w")]),
        ("dssxssx", 3, [(1, "d"), (2, "ssx")]),
    ],
)
def test_segments_of_any_kinds(layers, period, expected):
    found = [(repeats, "".join(pattern)) for repeats, pattern in segments(tuple(layers), period)]
    assert "".join(pattern * repeats for repeats, pattern in found) == layers
    assert found == expected


@hypothesis.given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 4))
def test_layers_that_are_sparse_and_layers_that_tokens_skip(num_layers, moe_every, depth_every, first_dense):
    hypothesis.assume(first_dense + moe_every <= num_layers and depth_every <= num_layers)
    model = ModelConfig(
        num_layers=num_layers,
        moe=MoEConfig(every=moe_every, first_dense=first_dense),
        depth=DepthConfig(every=depth_every),
    )
    plan = segments(model.layers, model.period)
    laid = sum((pattern * repeats for repeats, pattern in plan), ())
    assert [kind.sparse for kind in laid] == list(model.sparse)
    assert [i for i, kind in enumerate(laid, 1) if kind.wrapped] == list(
        range(depth_every, num_layers + 1, depth_every)
    )


@hypothesis.given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 8))
def test_segments_laid_end_to_end_are_the_layers(num_layers, every, first_dense):
    config = MoEConfig(every=every, first_dense=first_dense)
    sparse = tuple(i >= first_dense and (i - first_dense + 1) % every == 0 for i in range(num_layers))
    if any(sparse):
        assert ModelConfig(num_layers=num_layers, moe=config).sparse == sparse
    plan = segments(sparse, every)
    assert sum((pattern * repeats for repeats, pattern in plan), ()) == sparse
    assert len(plan) <= 3


def config(**options) -> ModelConfig:
    """Five layers: dense, then twice dense and sparse."""
    moe = MoEConfig(num_experts=4, top_k=2, every=2, first_dense=1)
    return ModelConfig(num_layers=5, d_model=8, num_heads=2, d_ff=8, moe=moe, **options)


SEGMENTS_BL = jnp.asarray([[1, 1, 1, 1], [1, 1, 2, 0]])
CONTEXT = Context(SEGMENTS_BL, jnp.broadcast_to(jnp.arange(4), (2, 4)), row_sight(SEGMENTS_BL), SEGMENTS_BL > 0)
X_BLD = jax.random.normal(jax.random.key(1), (2, 4, 8))


@pytest.mark.parametrize("key", [None, jax.random.key(3)], ids=["evaluation", "training"])
def test_scanned_and_unrolled_layers_agree_and_share_their_parameters(key):
    results = []
    for scan_layers in (True, False):
        stack = Stack(jax.random.key(0), config(scan_layers=scan_layers, dropout=0.2), DEFAULT)
        results.append((jax.tree.leaves(stack), jax.jit(lambda stack, x: stack(x, CONTEXT, key)[:2])(stack, X_BLD)))
    (weights, (scanned, stats)), (same_weights, (unrolled, other_stats)) = results
    for one, two in zip(weights, same_weights, strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(scanned, unrolled, rtol=1e-5, atol=1e-5)
    for one, two in zip(jax.tree.leaves(stats), jax.tree.leaves(other_stats), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def test_statistics_are_stacked_over_the_sparse_layers():
    stack = Stack(jax.random.key(0), config(), DEFAULT)
    _, reports, cache = stack(X_BLD, CONTEXT, None)
    stats = reports.feed_forward
    assert cache is None
    assert stats is not None
    assert stats.router.load_UE.shape == (2, 2, 4)
    np.testing.assert_array_equal(stats.router.load_UE.sum((1, 2)), [14, 14])
    assert not np.array_equal(stats.router.importance_UE[0], stats.router.importance_UE[1])


def test_layers_are_initialised_apart():
    stack = Stack(jax.random.key(0), config(), DEFAULT)
    dense, sparse = LayerKind(False), LayerKind(True)
    assert stack.plan == ((1, (dense,)), (2, (dense, sparse)))
    dense, sparse = stack.units[1].blocks
    assert isinstance(dense.feed_forward, Mlp)
    assert isinstance(sparse.feed_forward, MoE)
    for weight in (dense.feed_forward.up_DF[...], sparse.feed_forward.experts.up_EDF[...]):
        assert weight.shape[0] == 2
        assert not np.array_equal(weight[0], weight[1])


def test_a_dense_stack_has_no_statistics():
    dense = config().replace(moe=None)
    assert Stack(jax.random.key(0), dense, DEFAULT)(X_BLD, CONTEXT, None)[1] == Reports()


def test_the_result_is_that_of_the_blocks_in_order():
    stack = Stack(jax.random.key(0), config(), DEFAULT)
    x_BLD = X_BLD
    for unit, (repeats, _) in zip(stack.units, stack.plan, strict=True):
        for i in range(repeats):
            for block in jax.tree.map(lambda leaf, i=i: leaf[i], unit).blocks:
                x_BLD = block(x_BLD, CONTEXT, None)[0]
    np.testing.assert_allclose(stack(X_BLD, CONTEXT, None)[0], x_BLD, rtol=1e-4, atol=1e-5)
