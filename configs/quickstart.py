"""The first run: a byte-level language model with sparse experts, on text that every machine has.

python experiments/train.py --config=configs/quickstart.py --workdir=runs/quickstart
`--config=configs/quickstart.py:dense` is its FLOP-matched dense twin.
"""

from ml_collections import ConfigDict

from sparse_lm.config import to_config_dict
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import CheckpointConfig, TrainConfig


def get_config(variant: str = "sparse") -> ConfigDict:
    moe = MoEConfig(num_experts=16, top_k=4, router=TopK(renormalise="before_drop"))
    if variant not in ("sparse", "dense"):
        raise ValueError(f"configs/quickstart.py:{variant}: the variants are sparse and dense")
    return to_config_dict(
        Experiment(
            model=ModelConfig(num_layers=4, d_model=128, num_heads=4, d_ff=512, moe=moe if variant == "sparse" else None),
            data=DataConfig(source="stdlib", length=128),
            optim=OptimConfig(learning_rate=2e-3, warmup_steps=50),
            train=TrainConfig(steps=1000, batch_size=16, eval_every=250),
            checkpoint=CheckpointConfig(every=250),
        )
    )
