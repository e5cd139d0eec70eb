"""One layer: where the norms stand, dense and sparse, dropout keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.models.block import Block, Context
from sparse_lm.models.config import LayerKind, ModelConfig
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.layer import MoE
from sparse_lm.nn.attend import row_sight
from sparse_lm.nn.attention import Attention
from sparse_lm.nn.mlp import Mlp
from sparse_lm.sharding import DEFAULT

SEGMENTS_BL = jnp.asarray([[1, 1, 1, 2, 2, 0]])
CONTEXT = Context(SEGMENTS_BL, jnp.asarray([[0, 1, 2, 0, 1, 2]]), row_sight(SEGMENTS_BL), SEGMENTS_BL > 0)
X_BLD = jax.random.normal(jax.random.key(1), (1, 6, 8))


def build(sparse: bool = False, **options: Any) -> Block:
    config = ModelConfig(
        num_layers=1, d_model=8, num_heads=2, d_ff=8, moe=MoEConfig(num_experts=4, top_k=2, every=1), **options
    )
    return Block(jax.random.key(0), config, LayerKind(sparse), DEFAULT)


def attended(block: Block, x_BLD):
    assert isinstance(block.attention, Attention)
    return block.attention(x_BLD, CONTEXT.positions_BL, CONTEXT.sight)[0]


def test_pre_norm_adds_the_parts_to_the_stream():
    block = build()
    y_BLD, reports, cache = block(X_BLD, CONTEXT, None)
    assert reports.feed_forward is None
    assert cache is None
    middle = X_BLD + attended(block, block.attention_norm(X_BLD))
    assert isinstance(block.feed_forward, Mlp)
    expected = middle + block.feed_forward(block.feed_forward_norm(middle))
    np.testing.assert_allclose(y_BLD, expected, rtol=1e-5, atol=1e-6)


def test_post_norm_normalises_the_sums():
    block = build(norm_position="post", norm="layernorm")
    middle = block.attention_norm(X_BLD + attended(block, X_BLD))
    assert isinstance(block.feed_forward, Mlp)
    expected = block.feed_forward_norm(middle + block.feed_forward(middle))
    np.testing.assert_allclose(block(X_BLD, CONTEXT, None)[0], expected, rtol=1e-5, atol=1e-6)


def test_a_sparse_layer_reports_what_it_routed():
    block = build(sparse=True)
    y_BLD, reports, _ = block(X_BLD, CONTEXT, None)
    stats = reports.feed_forward
    assert isinstance(block.feed_forward, MoE)
    assert stats is not None
    assert int(stats.router.tokens_U.sum()) == 5
    assert int(stats.router.padding_U.sum()) == 1
    middle = X_BLD + attended(block, block.attention_norm(X_BLD))
    expected = middle + block.feed_forward(block.feed_forward_norm(middle), CONTEXT.real_BL)[0]
    np.testing.assert_allclose(y_BLD, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sparse", [False, True])
def test_dropout_needs_a_key(sparse):
    block = build(sparse, dropout=0.5)
    once, twice = (block(X_BLD, CONTEXT, jax.random.key(seed))[0] for seed in (1, 2))
    assert not np.allclose(once, twice)
    np.testing.assert_array_equal(block(X_BLD, CONTEXT, None)[0], build(sparse)(X_BLD, CONTEXT, None)[0])


def test_experts_have_their_share_of_the_width():
    block = build(sparse=True)
    assert isinstance(block.feed_forward, MoE)
    assert block.feed_forward.experts.up_EDF.shape == (4, 8, 4)
