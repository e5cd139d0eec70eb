"""gpt-oss (OpenAI 2025, 2508.10925): 20.9B and 116.8B parameters, 3.6B and 5.1B active; every other layer has windows.

python experiments/plan.py --config=configs/paper/gpt_oss.py:120b --topology=v5p:4x8x8
Active counts leave out the table of input embeddings. The training is not published; optimizer and balance are ours.
The released experts are stored in 4 bits (MXFP4), which is not there.
"""

from ml_collections import ConfigDict

from sparse_lm.config import to_config_dict
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.config import BalanceConfig, MoEConfig
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.nn.config import HeadsConfig
from sparse_lm.nn.rope_scaling import Yarn
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import MeshConfig, TrainConfig

PUBLISHED = {"20b": ("20.9B", "3.6B", "v5p:4x4x4"), "120b": ("116.8B", "5.1B", "v5p:4x8x8")}  # total, active, slice


def get_config(variant: str = "20b") -> ConfigDict:
    if variant not in PUBLISHED:
        raise ValueError(f"the variants are {', '.join(PUBLISHED)}, not {variant}")
    large = variant == "120b"
    moe = MoEConfig(num_experts=128 if large else 32, top_k=4, d_expert=2880, expert_bias=True, every=1)
    moe = moe.replace(router=TopK(gate="softmax_after", bias=True), balance=BalanceConfig(load=0.001))
    moe = moe.replace(capacity_factor=None, capacity_factor_eval=None, dispatcher="ragged_all_to_all")
    scaling = Yarn(factor=32.0, original_length=4096, truncate=False)
    heads = HeadsConfig(qkv_bias=True, out_bias=True, sinks=True, windows=(128, None), rope_scaling=scaling)
    model = ModelConfig(vocab_size=201_088, num_layers=36 if large else 24, d_model=2880, num_heads=64, head_dim=64)
    model = model.replace(num_kv_heads=8, d_ff=2880, activation="clamped_swiglu", rope_base=1.5e5, norm_eps=1e-5)
    model = model.replace(tie_embeddings=False, dtype="bfloat16", remat="full", heads=heads, moe=moe)
    optim = OptimConfig(learning_rate=3e-4, warmup_steps=2000, beta2=0.95)
    train = TrainConfig(steps=500_000, batch_size=1024, accumulate=1 if large else 4, sample_tokens=0)
    data, mesh = DataConfig(length=4096), MeshConfig(data=1, fsdp=-1, expert=4 if variant == "20b" else 8)
    return to_config_dict(Experiment(model=model, data=data, optim=optim, train=train, mesh=mesh))
