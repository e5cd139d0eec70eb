"""Kimi K2 (2507.20534): 1.04T parameters, 32.6B of them active; as DeepSeek-V3, with 384 experts and 64 heads.

python experiments/plan.py --config=configs/paper/kimi_k2.py --topology=v5p:8x16x16
Its sizes give 1.026T, 1.3 % less than published. Pretraining at 4,096 tokens, before YaRN. The optimizer is ours: the
paper's is Muon with clipped queries and keys (MuonClip).
"""

from ml_collections import ConfigDict

from sparse_lm.config import to_config_dict
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.config import BalanceConfig, MoEConfig
from sparse_lm.moe.routers.sigmoid import Sigmoid
from sparse_lm.nn.config import HeadsConfig, LatentConfig
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import MeshConfig, TrainConfig

PUBLISHED = {"": ("1.04T", "32.6B", "v5p:8x16x16")}  # total, active, slice


def get_config() -> ConfigDict:
    balance = BalanceConfig(load=1e-4, z=0.0, scope="sequence")
    moe = MoEConfig(num_experts=384, top_k=8, d_expert=2048, num_shared=1, every=1, first_dense=1, balance=balance)
    moe = moe.replace(capacity_factor=None, capacity_factor_eval=None, dispatcher="ragged_all_to_all")
    moe = moe.replace(router=Sigmoid(scale=2.827))
    model = ModelConfig(vocab_size=163_840, num_layers=61, d_model=7168, num_heads=64, head_dim=128, d_ff=18_432)
    model = model.replace(heads=HeadsConfig(latent=LatentConfig(kv_rank=512, query_rank=1536)), moe=moe)
    model = model.replace(rope_base=5e4, tie_embeddings=False, dtype="bfloat16", remat="full")
    optim = OptimConfig(learning_rate=2e-4, warmup_steps=500, beta2=0.95)
    train = TrainConfig(steps=230_000, batch_size=16_384, accumulate=2, sample_tokens=0)
    data, mesh = DataConfig(length=4096), MeshConfig(data=1, fsdp=-1, expert=16)
    return to_config_dict(Experiment(model=model, data=data, optim=optim, train=train, mesh=mesh))
