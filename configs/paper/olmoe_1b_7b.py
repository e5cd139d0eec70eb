"""OLMoE-1B-7B (Muennighoff et al. 2024, 2409.02060): 6.9B parameters, 1.3B of them active; 64 experts, 8 per token.

python experiments/plan.py --config=configs/paper/olmoe_1b_7b.py --topology=v5p:4x4x4
Optimizer, rate and losses are the paper's; it also decays norms and embeddings, and ends with a linear phase to zero.
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

PUBLISHED = {"": ("6.92B", "1.28B", "v5p:4x4x4")}  # total, active, slice


def get_config() -> ConfigDict:
    moe = MoEConfig(num_experts=64, top_k=8, d_expert=1024, every=1, balance=BalanceConfig(load=0.01, z=0.001))
    moe = moe.replace(capacity_factor=None, capacity_factor_eval=None, dispatcher="ragged_all_to_all")
    model = ModelConfig(vocab_size=50_304, num_layers=16, d_model=2048, num_heads=16, d_ff=1024, moe=moe)
    model = model.replace(norm_eps=1e-5, tie_embeddings=False, dtype="bfloat16", remat="full")
    model = model.replace(heads=HeadsConfig(qk_norm="model"))
    optim = OptimConfig(learning_rate=4e-4, warmup_steps=2500, beta2=0.95)
    train = TrainConfig(steps=1_200_000, batch_size=1024, sample_tokens=0)
    data, mesh = DataConfig(length=4096), MeshConfig(data=1, fsdp=-1, expert=4)
    return to_config_dict(Experiment(model=model, data=data, optim=optim, train=train, mesh=mesh))
