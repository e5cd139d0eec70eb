"""MoE++ (Jin et al. 2024, 2410.07348), size of the quickstart: 8 experts, and 4 that cost nothing, two per token.

python experiments/train.py --config=configs/moe_plus_plus.py --workdir=runs/moe_plus_plus
Variants: `ordinary` (the same 8 experts alone: more FLOPs per token), and `dense`, the twin with as many active
parameters as MoE++ expects at balance.
"""

from ml_collections import ConfigDict

from sparse_lm.config import to_config_dict
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.counts import dense_twin
from sparse_lm.moe.config import BalanceConfig, MoEConfig
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import CheckpointConfig, TrainConfig

VARIANTS = ("sparse", "ordinary", "dense")


def get_config(variant: str = "sparse") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"configs/moe_plus_plus.py:{variant}: the variants are {', '.join(VARIANTS)}")
    moe = MoEConfig(num_experts=8, top_k=2, every=1, capacity_factor=1.1)
    if variant != "ordinary":
        moe = moe.replace(num_zero=1, num_copy=1, num_constant=2, free_share=0.75, router=TopK(pathway=True))
    # The paper's loss is k / worth at balance where it is 1 here, and its weight of it 0.01; there is no z-loss.
    moe = moe.replace(balance=BalanceConfig(load=0.01 * moe.top_k / moe.worth, z=0.0))
    model = ModelConfig(num_layers=4, d_model=128, num_heads=4, d_ff=512, activation="gelu", moe=moe)
    return to_config_dict(
        Experiment(
            model=dense_twin(model) if variant == "dense" else model,
            data=DataConfig(source="stdlib", length=128),
            optim=OptimConfig(learning_rate=2e-3, warmup_steps=50),
            train=TrainConfig(steps=1500, batch_size=8, eval_every=250, eval_batches=96),
            checkpoint=CheckpointConfig(every=250),
        )
    )
