"""Qwen1.5-MoE-A2.7B (Qwen team 2024; model card, no paper): 14.3B parameters, 2.7B active; a gated shared expert.

python experiments/plan.py --config=configs/paper/qwen1_5_moe.py --topology=v5p:4x4x4
The training is not published; optimizer and balance are ours. Its upcycled start is not there.
"""

from ml_collections import ConfigDict

from sparse_lm.config import to_config_dict
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.config import BalanceConfig, MoEConfig
from sparse_lm.nn.config import HeadsConfig
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import MeshConfig, TrainConfig

PUBLISHED = {"": ("14.3B", "2.7B", "v5p:4x4x4")}  # total, active, slice


def get_config() -> ConfigDict:
    moe = MoEConfig(num_experts=60, top_k=4, d_expert=1408, num_shared=1, d_shared=5632, shared_gate="sigmoid", every=1)
    moe = moe.replace(capacity_factor=None, capacity_factor_eval=None, dispatcher="ragged_all_to_all")
    model = ModelConfig(vocab_size=151_936, num_layers=24, d_model=2048, num_heads=16, d_ff=5632, moe=moe)
    model = model.replace(rope_base=1e6, tie_embeddings=False, dtype="bfloat16", remat="full")
    model = model.replace(heads=HeadsConfig(qkv_bias=True), moe__balance=BalanceConfig(load=0.001))
    optim = OptimConfig(learning_rate=3e-4, warmup_steps=2000, beta2=0.95)
    train = TrainConfig(steps=250_000, batch_size=1024, accumulate=2, sample_tokens=0)
    data, mesh = DataConfig(length=4096), MeshConfig(data=1, fsdp=-1, expert=4)
    return to_config_dict(Experiment(model=model, data=data, optim=optim, train=train, mesh=mesh))
