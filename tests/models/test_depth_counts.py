"""What models cost whose tokens skip layers: by hand, against the real tree, and their dense twins."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from flax import nnx

from sparse_lm.config import ConfigError
from sparse_lm.models.config import DepthConfig, ModelConfig
from sparse_lm.models.counts import Part, count, dense_twin
from sparse_lm.models.decoder import Decoder
from sparse_lm.moe.config import MoEConfig
from sparse_lm.sharding import DEFAULT

DENSE = ModelConfig(vocab_size=10, num_layers=2, d_model=4, num_heads=2, d_ff=6, position="none")
QUARTER = DepthConfig(capacity=0.25, every=2)


def test_by_hand():
    """Two layers, of which a quarter of the tokens pass the second."""
    counts = count(DENSE.replace(depth=QUARTER))
    assert counts.attention == Part(128, 80, 80)  # 2 of 64; 64 + 16
    assert counts.dense == Part(144, 90, 90)  # 2 of 72; 72 + 18
    assert counts.norms == Part(20, 14, 0)  # 2 of 8 and the last 4; 8 + 2 + 4
    assert counts.depth == Part(4, 4, 4)
    assert counts.score_width(8) == 68  # 2 heads of 2 for keys and for values, times 1 + 1/16, times 8
    # 6 * (80 + 90 + 4 + 40 + 68)
    assert counts.flops_per_token(8) == 6 * 282
    assert counts.part_flops("depth", 8) == 24


def test_the_predictor_counts():
    depth = dataclasses.replace(QUARTER, predictor="mlp", hidden=3)
    # A weight of 4, a network of 4 * 3 + 3, and a bias of 3 that multiplies nothing.
    assert count(DENSE.replace(depth=depth)).depth == Part(22, 22, 19)


def test_sparse_layers_count_by_the_tokens_that_pass_them():
    moe = MoEConfig(num_experts=4, top_k=2, d_expert=3, every=1, num_shared=1)
    counts = count(DENSE.replace(moe=moe, depth=QUARTER))
    assert counts.experts == Part(288, 90, 90)  # 2 layers, 36 per expert, 2 of 4, five quarters of a layer
    assert counts.shared == Part(72, 45, 45)
    assert counts.router == Part(32, 20, 20)
    assert counts.dense == Part(0, 0, 0)
    apart = count(DENSE.replace(moe=moe.replace(every=2), depth=QUARTER))  # the only sparse layer is the wrapped one
    assert apart.experts == Part(144, 18, 18)
    assert apart.dense == Part(72, 72, 72)


@pytest.mark.parametrize("predictor", ["router", "mlp"])
@pytest.mark.parametrize("moe", [None, MoEConfig(num_experts=4, top_k=2, every=3)])
def test_all_parameters_of_the_real_tree_are_counted(predictor, moe):
    depth = dataclasses.replace(QUARTER, predictor=predictor)
    config = DENSE.replace(num_layers=7, moe=moe, depth=depth)
    tree = jax.eval_shape(lambda key: nnx.state(Decoder(key, config, DEFAULT), nnx.Param), jax.random.key(0))
    assert count(config).total == sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_a_model_that_no_token_skips_costs_what_it_did():
    everywhere = count(DENSE.replace(depth=QUARTER.replace(capacity=1.0)))
    assert dataclasses.replace(everywhere, depth=Part(0, 0, 0)) == count(DENSE)


@pytest.mark.parametrize("moe", [None, MoEConfig(num_experts=8, top_k=2)])
@pytest.mark.parametrize("capacity", [0.125, 0.5])
def test_the_twin_costs_the_same(moe, capacity):
    config = ModelConfig(vocab_size=64, num_layers=8, d_model=128, num_heads=4, d_ff=512, moe=moe)
    config = config.replace(depth=QUARTER.replace(capacity=capacity))
    twin = dense_twin(config)
    assert twin.depth is None and twin.moe is None
    assert twin.num_layers == (4 if capacity == 0.125 else 6)  # 4 + 4 / 8, rounded; 4 + 4 / 2
    one, two = count(config), count(twin)
    extra = sum(one.part_flops(name, 128) for name in ("router", "depth"))
    assert two.flops_per_token(128) == pytest.approx(one.flops_per_token(128) - extra, rel=0.02)


def test_a_twin_without_room_for_feed_forward_layers_is_refused():
    config = ModelConfig(vocab_size=8, num_layers=2, d_model=64, num_heads=1, d_ff=1)
    with pytest.raises(ConfigError, match=r"depth\.capacity=0\.9.*no twin"):
        dense_twin(config.replace(num_kv_heads=1, depth=DepthConfig(capacity=0.9, every=1), num_layers=1))
