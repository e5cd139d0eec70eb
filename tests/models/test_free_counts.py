"""Parameters and FLOPs of models with free experts, and their dense twins."""

from __future__ import annotations

import jax
import pytest
from flax import nnx

from sparse_lm.config import ConfigError
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.counts import Part, count, dense_twin
from sparse_lm.models.decoder import Decoder
from sparse_lm.moe.config import MoEConfig
from sparse_lm.sharding import DEFAULT

MOE = MoEConfig(num_experts=6, top_k=2, d_expert=10, every=1, num_zero=1, num_copy=1, num_constant=2, free_share=0.5)
CONFIG = ModelConfig(vocab_size=16, num_layers=2, d_model=4, num_heads=2, d_ff=20, activation="gelu", moe=MOE)


def test_by_hand():
    """A token has 2 * 0.5 * 6 / (0.5 * 6 + 4) = 6 / 7 experts of 2 * 4 * 10 weights in each of 2 layers."""
    counts = count(CONFIG)
    assert counts.experts == Part(6 * 160, round(160 * 6 / 7), round(160 * 6 / 7))
    assert counts.free == Part(48, 48, 48)  # 2 layers, 2 constant experts of 4 * 2 and 4
    assert counts.router == Part(80, 80, 80)  # 2 layers, 4 * 10: all experts
    assert counts.part_flops("free", 8) == 6 * 48


def test_parts_are_those_of_the_real_tree():
    leaves = jax.tree_util.tree_flatten_with_path(
        jax.eval_shape(lambda key: nnx.state(Decoder(key, CONFIG, DEFAULT), nnx.Param), jax.random.key(0))
    )[0]
    sizes = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size for path, leaf in leaves}
    counts = count(CONFIG)
    assert counts.total == sum(sizes.values())
    assert counts.free.total == sum(size for path, size in sizes.items() if "/free/" in path)


def test_as_much_as_top_k_when_free_experts_are_not_there():
    without = CONFIG.replace(moe__num_zero=0, moe__num_copy=0, moe__num_constant=0, moe__free_share=1.0)
    counts = count(without)
    assert counts.experts.active == 2 * 160 and counts.free == Part(0, 0, 0)
    assert dense_twin(without).d_ff == 20


def test_the_twin_has_the_expected_width_rounded():
    twin = dense_twin(CONFIG)
    assert twin.moe is None and twin.d_ff == round(10 * 6 / 7) == 9
    sparse, dense = count(CONFIG), count(twin)
    assert dense.dense.multiplied == pytest.approx(sparse.experts.multiplied, rel=0.06)  # 9 for 8.57


def test_no_twin_where_dense_layers_are_wider():
    with pytest.raises(ConfigError) as caught:
        dense_twin(CONFIG.replace(moe__every=2))
    assert caught.value.key == "model.moe.d_expert"
