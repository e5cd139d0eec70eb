"""Phi-3.5-MoE (2404.14219): 42B parameters, 6.6B of them active; 16 experts, two per token drawn by SparseMixer.

python experiments/plan.py --config=configs/paper/phi3_5_moe.py --topology=v5p:4x4x8
At 4,096 tokens, before LongRoPE, whose divisors are of the release. Not there: the bias of the output logits. The
training is not published; optimizer and balance are ours.
"""

from ml_collections import ConfigDict

from sparse_lm.config import to_config_dict
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers.sparse_mixer import SparseMixer
from sparse_lm.nn.config import HeadsConfig
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import MeshConfig, TrainConfig

PUBLISHED = {"": ("42B", "6.6B", "v5p:4x4x8")}  # total, active, slice


def get_config() -> ConfigDict:
    moe = MoEConfig(num_experts=16, top_k=2, d_expert=6400, every=1, router=SparseMixer(jitter=0.01))
    moe = moe.replace(capacity_factor=None, capacity_factor_eval=None, dispatcher="ragged_all_to_all")
    model = ModelConfig(vocab_size=32_064, num_layers=32, d_model=4096, num_heads=32, num_kv_heads=8, d_ff=6400)
    model = model.replace(norm="layernorm", norm_eps=1e-5, heads=HeadsConfig(qkv_bias=True, out_bias=True))
    model = model.replace(tie_embeddings=False, dtype="bfloat16", remat="full", moe=moe)
    optim = OptimConfig(learning_rate=3e-4, warmup_steps=2000, beta2=0.95)
    train = TrainConfig(steps=500_000, batch_size=1024, sample_tokens=0)
    data, mesh = DataConfig(length=4096), MeshConfig(data=1, fsdp=-1, expert=8)
    return to_config_dict(Experiment(model=model, data=data, optim=optim, train=train, mesh=mesh))
