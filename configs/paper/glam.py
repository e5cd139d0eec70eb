"""GLaM (Du et al. 2021, 2112.06905, table 4): two of 64 experts in every other layer; pretraining.

python experiments/plan.py --config=configs/paper/glam.py:64b_64e --topology=v5p:8x8x16
Dense layers are GELU-gated in the paper; here they have two matrices of 1.5 times the width, as many parameters.
Positions are sinusoidal, not a relative bias. Counts fit a vocabulary of 256,000 (64B), 32,000 (others), none (145M).
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

PUBLISHED = {  # total, active, slice
    "0.1b_64e": ("1.9B", "145M", "v5p:2x2x4"),
    "1.7b_64e": ("27B", "1.879B", "v5p:4x4x4"),
    "8b_64e": ("143B", "9.8B", "v5p:4x8x8"),
    "64b_64e": ("1.2T", "96.6B", "v5p:8x8x16"),
}
SIZES = {"0.1b": (12, 768, 12, 64), "1.7b": (24, 2048, 16, 128), "8b": (32, 4096, 32, 128), "64b": (64, 8192, 128, 128)}


def get_config(variant: str = "64b_64e") -> ConfigDict:
    if variant not in PUBLISHED:
        raise ValueError(f"the variants are {', '.join(PUBLISHED)}, not {variant}")
    layers, width, heads, head_dim = SIZES[variant.removesuffix("_64e")]
    moe = MoEConfig(num_experts=64, top_k=2, d_expert=4 * width, capacity_factor=1.0, dispatcher="all_to_all")
    moe = moe.replace(router=TopK(second_expert="gshard", renormalise="before_drop"))
    model = ModelConfig(num_layers=layers, d_model=width, num_heads=heads, head_dim=head_dim, d_ff=6 * width, moe=moe)
    model = model.replace(vocab_size=256_000 if width == 8192 else 32_000, activation="gelu", norm="layernorm")
    model = model.replace(position="sinusoidal", dtype="bfloat16", remat="full")
    optim = OptimConfig(name="adafactor", learning_rate=0.01, schedule="rsqrt", warmup_steps=10_000, weight_decay=0.0)
    train = TrainConfig(steps=600_000, batch_size=1024, sample_tokens=0)
    mesh = MeshConfig(data=1, fsdp=-1, expert=4 if variant == "1.7b_64e" else 8)
    return to_config_dict(Experiment(model=model, data=DataConfig(length=1024), optim=optim, train=train, mesh=mesh))
