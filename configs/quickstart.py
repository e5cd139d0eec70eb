"""The first run: a byte-level language model with sparse experts, on text that every machine has.

python experiments/train.py --config=configs/quickstart.py --workdir=runs/quickstart
`--config=configs/quickstart.py:dense` is its dense twin: the same FLOPs per token, data and steps, without experts.
"""

from ml_collections import ConfigDict

from sparse_lm.config import to_config_dict
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.counts import dense_twin
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import CheckpointConfig, TrainConfig


def get_config(variant: str = "sparse") -> ConfigDict:
    if variant not in ("sparse", "dense"):
        raise ValueError(f"configs/quickstart.py:{variant}: the variants are sparse and dense")
    # Fine-grained experts: 32 of a quarter of the dense width, four per token. A capacity of 2 drops about 1 %.
    moe = MoEConfig(num_experts=32, top_k=4, capacity_factor=2.0, router=TopK(renormalise="before_drop"))
    model = ModelConfig(num_layers=4, d_model=128, num_heads=4, d_ff=512, activation="gelu", moe=moe)
    return to_config_dict(
        Experiment(
            model=model if variant == "sparse" else dense_twin(model),
            data=DataConfig(source="stdlib", length=128),
            optim=OptimConfig(learning_rate=2e-3, warmup_steps=50),
            train=TrainConfig(steps=1500, batch_size=8, eval_every=250, eval_batches=96),
            checkpoint=CheckpointConfig(every=250),
        )
    )
