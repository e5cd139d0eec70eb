"""DeepSeekMoE (Dai et al. 2024, 2401.06066): fine-grained experts beside shared ones; 2.0B/0.3B and 16.4B/2.8B active.

python experiments/plan.py --config=configs/paper/deepseek_moe.py:16b --topology=v5p:4x4x4
Optimizer and balance are the paper's; its rate falls in two steps (to 0.316 at 80 and at 90 %), here along a cosine.
The width of an expert of 2B is ours: a quarter of a feed-forward layer of 8/3 of the model's width.
"""

from ml_collections import ConfigDict

from sparse_lm.config import to_config_dict
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.config import BalanceConfig, MoEConfig
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import MeshConfig, TrainConfig

PUBLISHED = {"2b": ("2.0B", "0.3B", "v5p:2x2x4"), "16b": ("16.4B", "2.8B", "v5p:4x4x4")}  # total, active, slice


def get_config(variant: str = "16b") -> ConfigDict:
    if variant not in PUBLISHED:
        raise ValueError(f"the variants are {', '.join(PUBLISHED)}, not {variant}")
    small = variant == "2b"
    moe = MoEConfig(num_experts=63 if small else 64, top_k=7 if small else 6, num_shared=1 if small else 2, every=1)
    moe = moe.replace(d_expert=854 if small else 1408, first_dense=0 if small else 1)
    moe = moe.replace(capacity_factor=None, capacity_factor_eval=None, dispatcher="ragged_all_to_all")
    moe = moe.replace(balance=BalanceConfig(load=0.01 if small else 0.001, z=0.0))
    if small:
        model = ModelConfig(vocab_size=8192, num_layers=9, d_model=1280, num_heads=10, d_ff=3416, moe=moe)
    else:
        model = ModelConfig(vocab_size=102_400, num_layers=28, d_model=2048, num_heads=16, d_ff=10_944, moe=moe)
    model = model.replace(tie_embeddings=False, dtype="bfloat16", remat="full")
    optim = OptimConfig(learning_rate=1.08e-3 if small else 4.2e-4, warmup_steps=2000, beta2=0.95)
    train = TrainConfig(steps=25_000 if small else 106_449, batch_size=2048 if small else 4608, sample_tokens=0)
    train = train.replace(accumulate=2 if small else 9)
    data, mesh = DataConfig(length=2048 if small else 4096), MeshConfig(data=1, fsdp=-1, expert=1 if small else 4)
    return to_config_dict(Experiment(model=model, data=data, optim=optim, train=train, mesh=mesh))
