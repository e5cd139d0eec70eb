"""A table of 16,384 facts: what a model stores, not what it computes, decides the loss. Experts buy storage.

python experiments/train.py --config=configs/facts.py --workdir=runs/facts
`--config=configs/facts.py:dense` is the dense twin. Guessing costs log(128) = 4.85 nats, knowing the table 0.
"""

from ml_collections import ConfigDict

from sparse_lm.config import to_config_dict
from sparse_lm.data.config import DataConfig, FactsConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.counts import dense_twin
from sparse_lm.moe.config import MoEConfig
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import CheckpointConfig, TrainConfig


def get_config(variant: str = "sparse") -> ConfigDict:
    if variant not in ("sparse", "dense"):
        raise ValueError(f"configs/facts.py:{variant}: the variants are sparse and dense")
    model = ModelConfig(num_layers=2, d_model=32, num_heads=2, d_ff=64, activation="gelu", moe=MoEConfig(num_experts=8))
    return to_config_dict(
        Experiment(
            model=model if variant == "sparse" else dense_twin(model),
            data=DataConfig(source="facts", length=126, facts=FactsConfig(num_a=128, num_b=128, num_values=128)),
            optim=OptimConfig(learning_rate=2e-3, warmup_steps=50),
            train=TrainConfig(steps=3000, batch_size=24, eval_every=500, eval_batches=8, log_every=10),
            checkpoint=CheckpointConfig(every=500),
        )
    )
