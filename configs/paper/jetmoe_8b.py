"""JetMoE-8B (Shen et al. 2024, 2404.07413): 8.5B parameters, 2.2B active; experts in attention as well.

python experiments/plan.py --config=configs/paper/jetmoe_8b.py --topology=v5p:4x4x4
Active counts leave out the embeddings; the sizes give 2.27B. The paper's rate
stays constant before its annealing; here it is a cosine.
"""

from ml_collections import ConfigDict

from sparse_lm.config import to_config_dict
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.attention import Mixture
from sparse_lm.moe.config import BalanceConfig, MoEConfig
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import MeshConfig, TrainConfig

PUBLISHED = {"": ("8.5B", "2.2B", "v5p:4x4x4")}  # total, active, slice


def get_config() -> ConfigDict:
    balance = BalanceConfig(load=0.01, z=0.001)
    moe = MoEConfig(num_experts=8, top_k=2, d_expert=5632, every=1, router=TopK(gate="softmax_after"), balance=balance)
    moe = moe.replace(capacity_factor=None, capacity_factor_eval=None, dispatcher="ragged_all_to_all")
    model = ModelConfig(vocab_size=32_000, num_layers=24, d_model=2048, num_heads=32, num_kv_heads=16, head_dim=128)
    model = model.replace(d_ff=5632, dtype="bfloat16", remat="full", attention=Mixture(num_experts=8, top_k=2), moe=moe)
    optim = OptimConfig(learning_rate=5e-4, warmup_steps=2500, beta2=0.95)
    train = TrainConfig(steps=312_500, batch_size=1024, sample_tokens=0)
    data, mesh = DataConfig(length=4096), MeshConfig(data=1, fsdp=-1, expert=4)
    return to_config_dict(Experiment(model=model, data=data, optim=optim, train=train, mesh=mesh))
