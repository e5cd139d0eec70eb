"""OpenMoE (Xue et al. 2024, 2402.01739): routed experts beside a dense layer; 650M, 8.7B and 34B parameters.

python experiments/plan.py --config=configs/paper/openmoe.py:34b --topology=v5p:4x4x4
Active counts are published without the embeddings, as 142M, 2.1B and 6.0B; the sizes give 156M, 2.2B and 6.6B. It
starts with a mixture of denoising tasks (UL2), here the next token is predicted throughout; its loss of the size of the
output logits is not there. Capacity is ours.
"""

from ml_collections import ConfigDict

from sparse_lm.config import to_config_dict
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.config import BalanceConfig, MoEConfig
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import MeshConfig, TrainConfig

PUBLISHED = {  # total, active, slice
    "base": ("650M", "142M", "v5p:2x2x4"),
    "8b": ("8.7B", "2.1B", "v5p:4x4x4"),
    "34b": ("34B", "6.0B", "v5p:4x4x4"),
}
SIZES = {"base": (12, 768, 12, 64, 16, 4), "8b": (24, 2048, 24, 128, 32, 6), "34b": (32, 3072, 24, 128, 32, 4)}


def get_config(variant: str = "8b") -> ConfigDict:
    if variant not in PUBLISHED:
        raise ValueError(f"the variants are {', '.join(PUBLISHED)}, not {variant}")
    layers, width, heads, head_dim, experts, every = SIZES[variant]
    moe = MoEConfig(num_experts=experts, top_k=2, d_expert=4 * width, num_shared=1, every=every)
    moe = moe.replace(balance=BalanceConfig(load=0.01, z=1e-4), dispatcher="all_to_all")
    model = ModelConfig(vocab_size=256_384, num_layers=layers, d_model=width, num_heads=heads, head_dim=head_dim)
    model = model.replace(d_ff=4 * width, dtype="bfloat16", remat="full", moe=moe)
    optim = OptimConfig(name="adafactor", learning_rate=0.01, schedule="rsqrt", warmup_steps=10_000, weight_decay=0.0)
    train = TrainConfig(steps=100_000 if variant == "34b" else 500_000, batch_size=2048, accumulate=32, sample_tokens=0)
    data, mesh = DataConfig(length=2048), MeshConfig(data=1, fsdp=-1, expert=8 if variant == "base" else 4)
    return to_config_dict(Experiment(model=model, data=data, optim=optim, train=train, mesh=mesh))
