"""Mixtral 8x22B (Mistral AI 2024; architecture as 2401.04088): 141B parameters, 39B of them active.

python experiments/plan.py --config=configs/paper/mixtral_8x22b.py --topology=v5p:8x8x8
The training is not published; optimizer and balance are ours. Nothing is dropped.
"""

from ml_collections import ConfigDict

from sparse_lm.config import to_config_dict
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import MeshConfig, TrainConfig

PUBLISHED = {"": ("141B", "39B", "v5p:8x8x8")}  # total, active, slice


def get_config() -> ConfigDict:
    moe = MoEConfig(num_experts=8, top_k=2, d_expert=16_384, every=1, router=TopK(gate="softmax_after"))
    moe = moe.replace(capacity_factor=None, capacity_factor_eval=None, dispatcher="ragged_all_to_all")
    model = ModelConfig(vocab_size=32_768, num_layers=56, d_model=6144, num_heads=48, num_kv_heads=8, d_ff=16_384)
    model = model.replace(rope_base=1e6, norm_eps=1e-5, tie_embeddings=False, dtype="bfloat16", remat="full", moe=moe)
    optim = OptimConfig(learning_rate=3e-4, warmup_steps=2000, beta2=0.95)
    train, mesh = TrainConfig(steps=100_000, batch_size=1024, sample_tokens=0), MeshConfig(data=1, fsdp=-1, expert=8)
    data = DataConfig(length=4096)
    return to_config_dict(Experiment(model=model, data=data, optim=optim, train=train, mesh=mesh))
