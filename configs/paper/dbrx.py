"""DBRX (Databricks 2024; model card, no paper): 132B parameters, 36B of them active; 16 experts, 4 per token.

python experiments/plan.py --config=configs/paper/dbrx.py --topology=v5p:4x8x8
36B leaves out the table of input embeddings. The weight of the balance loss is the release's; the optimizer is ours.
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

PUBLISHED = {"": ("132B", "36B", "v5p:4x8x8")}  # total, active, slice


def get_config() -> ConfigDict:
    moe = MoEConfig(num_experts=16, top_k=4, d_expert=10_752, every=1, balance=BalanceConfig(load=0.05, z=0.0))
    moe = moe.replace(router=TopK(renormalise="before_drop"), capacity_factor=None, capacity_factor_eval=None)
    moe = moe.replace(dispatcher="ragged_all_to_all")
    model = ModelConfig(vocab_size=100_352, num_layers=40, d_model=6144, num_heads=48, num_kv_heads=8, d_ff=10_752)
    model = model.replace(norm="layernorm_no_bias", norm_eps=1e-5, rope_base=5e5, heads=HeadsConfig(clip_qkv=8.0))
    model = model.replace(tie_embeddings=False, dtype="bfloat16", remat="full", moe=moe)
    optim = OptimConfig(learning_rate=3e-4, warmup_steps=2000, beta2=0.95)
    train = TrainConfig(steps=500_000, batch_size=1024, sample_tokens=0)
    data, mesh = DataConfig(length=4096), MeshConfig(data=1, fsdp=-1, expert=8)
    return to_config_dict(Experiment(model=model, data=data, optim=optim, train=train, mesh=mesh))
