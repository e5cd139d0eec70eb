"""Options of the heads: patterns over layers, and what cannot work together, named with the way out."""

from __future__ import annotations

import pytest

from sparse_lm.config import ConfigError, from_dict, to_config_dict, to_dict
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.attention.switch_head import SwitchHead
from sparse_lm.nn.config import HeadsConfig, LatentConfig
from sparse_lm.nn.rope_scaling import LongRope, Yarn

BASE = ModelConfig(vocab_size=50, num_layers=5, d_model=16, num_heads=4)
LATENT = LatentConfig(kv_rank=5, rope_dim=2)


def test_patterns_repeat_over_the_layers():
    gpt_oss, llama = HeadsConfig(windows=(128, None)), HeadsConfig(chunks=(8, 8, None), rotated=(True, True, False))
    assert [gpt_oss.window(i) for i in range(4)] == [128, None, 128, None]
    assert [(llama.chunk(i), llama.rotates(i)) for i in (0, 2, 3, 5)] == [(8, True), (None, False)] * 2
    kinds = BASE.replace(heads=llama).layers
    assert [(kind.chunk, kind.rotated) for kind in kinds] == [(8, True), (8, True), (None, False), (8, True), (8, True)]
    assert BASE.replace(heads=llama.replace(windows=(4, None))).period == 6
    assert BASE.period == 1


def test_a_layer_that_does_not_rotate_has_no_base():
    config = BASE.replace(heads__rotated=(True, False))
    assert [config.shape_of(kind).rope_base for kind in config.layers[:2]] == [10_000.0, None]


def test_survives_json_and_flags():
    heads = HeadsConfig(windows=(128, None), rope_scaling=Yarn(factor=32, truncate=False), latent=LATENT)
    assert from_dict(HeadsConfig, to_dict(heads)) == heads
    assert from_dict(HeadsConfig, to_config_dict(heads)) == heads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads__windows": (4, 0)}, r"windows\[1\]=0: must be at least 1"),
        ({"heads__latent": LATENT, "heads__qkv_bias": True}, "qkv_bias=True: latent attention has no such"),
        ({"heads__latent": LATENT, "heads__qk_norm": "head"}, "qk_norm='head': latent attention normalises"),
        ({"heads__latent": LATENT, "num_kv_heads": 2}, "num_kv_heads=2: latent attention has one per query head"),
        ({"heads__implementation": "cudnn", "heads__sinks": True}, "sinks=True: is not in cudnn attention"),
        ({"heads__implementation": "cudnn"}, "heads.implementation='cudnn': needs dtype=bfloat16"),
        ({"heads__implementation": "chunked", "dropout": 0.1}, "dropout=0.1: is not in chunked attention"),
        ({"heads__rotated": (True, False), "position": "none"}, "heads.rotated=.*needs position=rope"),
        ({"heads__sinks": True, "attention": SwitchHead(num_experts=2)}, "heads.sinks=True: is not in attention with"),
        ({"heads__rope_scaling": LongRope((1.0,))}, "divisors are given and a head rotates 2 pairs"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        BASE.replace(**changes)


def test_an_odd_width_of_a_latent_key():
    with pytest.raises(ConfigError, match="rope_dim=3: rope rotates pairs"):
        LatentConfig(rope_dim=3)
