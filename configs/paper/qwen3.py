"""Qwen3 (2505.09388): 30.5B parameters, 3.3B active, and 235B, 22B active; 128 experts, 8 per token.

python experiments/plan.py --config=configs/paper/qwen3.py:235b --topology=v5p:8x8x8
The balance loss over the whole batch is the paper's; its weight and the optimizer are ours.
"""

from ml_collections import ConfigDict

from sparse_lm.config import to_config_dict
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.config import BalanceConfig, MoEConfig
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.nn.config import HeadsConfig
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import MeshConfig, TrainConfig

PUBLISHED = {"30b": ("30.5B", "3.3B", "v5p:4x4x4"), "235b": ("235B", "22B", "v5p:8x8x8")}  # total, active, slice


def get_config(variant: str = "30b") -> ConfigDict:
    if variant not in PUBLISHED:
        raise ValueError(f"the variants are {', '.join(PUBLISHED)}, not {variant}")
    large = variant == "235b"
    moe = MoEConfig(num_experts=128, top_k=8, d_expert=1536 if large else 768, every=1)
    moe = moe.replace(router=TopK(renormalise="before_drop"), balance=BalanceConfig(load=0.001, scope="global"))
    moe = moe.replace(capacity_factor=None, capacity_factor_eval=None, dispatcher="ragged_all_to_all")
    model = ModelConfig(vocab_size=151_936, num_layers=94 if large else 48, d_model=4096 if large else 2048, moe=moe)
    model = model.replace(num_heads=64 if large else 32, num_kv_heads=4, head_dim=128, d_ff=12_288 if large else 6144)
    model = model.replace(rope_base=1e6, tie_embeddings=False, dtype="bfloat16", remat="full")
    model = model.replace(heads=HeadsConfig(qk_norm="head"))
    optim = OptimConfig(learning_rate=3e-4, warmup_steps=2000, beta2=0.95)
    train = TrainConfig(steps=500_000, batch_size=2048, accumulate=1 if large else 4, sample_tokens=0)
    data, mesh = DataConfig(length=4096), MeshConfig(data=1, fsdp=-1, expert=4 if variant == "30b" else 8)
    return to_config_dict(Experiment(model=model, data=data, optim=optim, train=train, mesh=mesh))
