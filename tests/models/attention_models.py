"""Small models with the attention of published ones."""

from __future__ import annotations

from sparse_lm.models.config import ModelConfig
from sparse_lm.nn.config import HeadsConfig, LatentConfig
from sparse_lm.nn.rope_scaling import Yarn

BASE = ModelConfig(vocab_size=11, num_layers=2, d_model=8, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=8)
MODELS = {
    "gpt_oss": BASE.replace(
        heads=HeadsConfig(
            qkv_bias=True, out_bias=True, sinks=True, windows=(2, None), rope_scaling=Yarn(factor=4, original_length=4)
        )
    ),
    "llama_4": BASE.replace(heads=HeadsConfig(qk_norm="l2", chunks=(3, None), rotated=(True, False))),
    "grok_dbrx_qwen": BASE.replace(
        norm="layernorm_no_bias",
        norm_position="sandwich",
        heads=HeadsConfig(soft_cap=3.0, clip_qkv=0.5, qk_norm="head"),
    ),
    "deepseek": BASE.replace(
        num_kv_heads=None, heads=HeadsConfig(latent=LatentConfig(kv_rank=5, query_rank=7, rope_dim=2, value_dim=3))
    ),
}
