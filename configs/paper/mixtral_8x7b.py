"""Mixtral 8x7B (Jiang et al. 2024, 2401.04088): 46.7B parameters, 12.9B of them active; on 64 TPU v5p.

python experiments/plan.py --config=configs/paper/mixtral_8x7b.py --topology=v5p:4x4x4
The paper tells the architecture (table 1) and not the training; optimizer and balance are ours. Tokens beyond
1.0 times an equal share of the slots are dropped in training, none in evaluation; the released model drops none.
"""

from ml_collections import ConfigDict

from sparse_lm.config import to_config_dict
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import MeshConfig, ShardingConfig, TrainConfig

PUBLISHED = {"": ("46.7B", "12.9B", "v5p:4x4x4")}  # total, active, slice


def get_config() -> ConfigDict:
    moe = MoEConfig(num_experts=8, top_k=2, d_expert=14_336, every=1, router=TopK(gate="softmax_after"))
    moe = moe.replace(capacity_factor=1.0, capacity_factor_eval=None, dispatcher="all_to_all")
    model = ModelConfig(vocab_size=32_000, num_layers=32, d_model=4096, num_heads=32, num_kv_heads=8, d_ff=14_336)
    model = model.replace(rope_base=1e6, tie_embeddings=False, dtype="bfloat16", remat="full", moe=moe)
    return to_config_dict(
        Experiment(
            model=model,
            data=DataConfig(length=4096),
            optim=OptimConfig(learning_rate=3e-4, warmup_steps=2000, beta2=0.95),
            mesh=MeshConfig(data=1, fsdp=-1, expert=4),
            sharding=ShardingConfig(strategy="fsdp_over_ep"),
            train=TrainConfig(steps=100_000, batch_size=256, sample_tokens=0),
        )
    )
