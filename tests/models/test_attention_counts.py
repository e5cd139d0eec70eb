"""Parameters and FLOPs of every option of the heads against real parameter trees and published models."""

from __future__ import annotations

import jax
import pytest
from flax import nnx

from sparse_lm.models.attention_counts import score_widths
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.counts import count
from sparse_lm.models.decoder import Decoder
from sparse_lm.moe.config import MoEConfig
from sparse_lm.nn.config import HeadsConfig, LatentConfig
from sparse_lm.sharding import DEFAULT

BASE = ModelConfig(vocab_size=50, num_layers=4, d_model=12, num_heads=6, num_kv_heads=2, head_dim=4, d_ff=20)
LATENT = LatentConfig(kv_rank=5, rope_dim=2, value_dim=3)
CONFIGS = {
    "head_norm": BASE.replace(heads__qk_norm="head"),
    "model_norm": BASE.replace(heads__qk_norm="model"),
    "l2_norm": BASE.replace(heads__qk_norm="l2"),
    "biases": BASE.replace(heads__qkv_bias=True),
    "out_bias": BASE.replace(heads__out_bias=True),
    "sinks": BASE.replace(heads__sinks=True, heads__windows=(3, None)),
    "latent": BASE.replace(num_kv_heads=None, heads__latent=LATENT),
    "latent_queries": BASE.replace(
        num_kv_heads=None, heads=HeadsConfig(latent=LATENT.replace(query_rank=7), sinks=True, out_bias=True)
    ),
    "layernorm_no_bias": BASE.replace(norm="layernorm_no_bias"),
    "sandwich": BASE.replace(norm_position="sandwich", norm="layernorm"),
    "several_segments": BASE.replace(
        num_layers=7, heads__chunks=(8, 8, 8, None), heads__rotated=(True, True, True, False), heads__qk_norm="l2"
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_are_those_of_the_real_tree(name):
    config = CONFIGS[name]
    tree = jax.eval_shape(lambda key: nnx.state(Decoder(key, config, DEFAULT), nnx.Param), jax.random.key(0))
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    counts = count(config)
    attention = sum(size for path, size in found.items() if "/attention/" in path)
    vectors = ("bias", "norm", "sinks")
    products = sum(s for path, s in found.items() if "/attention/" in path and not any(v in path for v in vectors))
    assert counts.total == sum(found.values())
    assert (counts.attention.total, counts.attention.multiplied) == (attention, products)
    assert counts.attention.active == attention


def test_scores_by_hand():
    # 6 heads of 4, keys and values; the second layer's queries see 3 places, the fourth's a chunk of 2.
    config = BASE.replace(heads=HeadsConfig(windows=(None, 3), chunks=(None, None, None, 2)))
    assert score_widths(config) == ((48, None), (48, 3), (48, None), (48, 2))
    assert count(config).score_width(10) == 48 * (10 + 3 + 10 + 2)
    assert count(config).score_width(1) == 48 * 4
    # Keys of 4 + 2 and values of 3.
    assert score_widths(CONFIGS["latent"])[0] == (54, None)
    # 12 x layers x heads x width x length without a limit.
    assert count(BASE).part_flops("attention", 10) == 6 * count(BASE).attention.multiplied + 12 * 4 * 6 * 4 * 10


DEEPSEEK_V3 = ModelConfig(
    vocab_size=129280,
    num_layers=61,
    d_model=7168,
    num_heads=128,
    head_dim=128,
    d_ff=18432,
    tie_embeddings=False,
    heads=HeadsConfig(latent=LatentConfig(kv_rank=512, query_rank=1536, rope_dim=64)),
    moe=MoEConfig(num_experts=256, top_k=8, every=1, first_dense=3, d_expert=2048, num_shared=1),
)
QWEN3_30B = ModelConfig(
    vocab_size=151936,
    num_layers=48,
    d_model=2048,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    tie_embeddings=False,
    heads=HeadsConfig(qk_norm="head"),
    moe=MoEConfig(num_experts=128, top_k=8, every=1, d_expert=768),
)


@pytest.mark.parametrize(("config", "total", "active"), [(DEEPSEEK_V3, 671.0, 37.6), (QWEN3_30B, 30.5, 3.35)])
def test_published_models(config, total, active):
    counts = count(config)
    assert counts.total / 1e9 == pytest.approx(total, rel=0.002)
    assert counts.active / 1e9 == pytest.approx(active, rel=0.004)
