"""Qwen2-57B-A14B (2407.10671): 57.4B parameters, 14.2B of them active; 64 experts, 8 per token, and a gated shared one.

python experiments/plan.py --config=configs/paper/qwen2_57b.py --topology=v5p:4x4x8
The training's optimizer and balance are ours; its upcycled start is not there.
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

PUBLISHED = {"": ("57B", "14B", "v5p:4x4x8")}  # total, active, slice


def get_config() -> ConfigDict:
    moe = MoEConfig(num_experts=64, top_k=8, d_expert=2560, num_shared=1, d_shared=20_480, shared_gate="sigmoid")
    moe = moe.replace(every=1, capacity_factor=None, capacity_factor_eval=None, dispatcher="ragged_all_to_all")
    model = ModelConfig(vocab_size=151_936, num_layers=28, d_model=3584, num_heads=28, num_kv_heads=4, d_ff=18_944)
    model = model.replace(rope_base=1e6, tie_embeddings=False, dtype="bfloat16", remat="full", moe=moe)
    model = model.replace(heads=HeadsConfig(qkv_bias=True), moe__balance=BalanceConfig(load=0.001))
    optim = OptimConfig(learning_rate=3e-4, warmup_steps=2000, beta2=0.95)
    train = TrainConfig(steps=250_000, batch_size=1024, accumulate=2, sample_tokens=0)
    data, mesh = DataConfig(length=4096), MeshConfig(data=1, fsdp=-1, expert=8)
    return to_config_dict(Experiment(model=model, data=data, optim=optim, train=train, mesh=mesh))
