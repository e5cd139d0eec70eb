"""Mixture of Depths (Raposo et al. 2024), size of the quickstart: every second block is passed by 1/8 of the tokens.

python experiments/train.py --config=configs/mixture_of_depths.py --workdir=runs/mixture_of_depths
Variants: `mlp` (a network predicts who is chosen, without touching the model), `moe` (experts inside the wrapped
blocks: the paper's staged combination), and `dense`, the twin that all tokens pass: fewer layers at the same FLOPs.
"""

from ml_collections import ConfigDict

from sparse_lm.config import to_config_dict
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import DepthConfig, ModelConfig
from sparse_lm.models.counts import dense_twin
from sparse_lm.moe.config import MoEConfig
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import CheckpointConfig, TrainConfig

VARIANTS = ("router", "mlp", "moe", "dense")


def get_config(variant: str = "router") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"configs/mixture_of_depths.py:{variant}: the variants are {', '.join(VARIANTS)}")
    # In training a token's way depends on later tokens; that has to be accepted by name.
    depth = DepthConfig(capacity=0.125, every=2, allow_non_causal=True)
    model = ModelConfig(num_layers=4, d_model=128, num_heads=4, d_ff=512, activation="gelu", depth=depth)
    if variant == "mlp":
        model = model.replace(depth__predictor="mlp")
    elif variant == "moe":
        model = model.replace(moe=MoEConfig(num_experts=8, top_k=1, every=2, capacity_factor=2.0))
    elif variant == "dense":
        model = dense_twin(model.replace(vocab_size=264)).replace(vocab_size=None)  # of the bytes, for the count alone
    return to_config_dict(
        Experiment(
            model=model,
            data=DataConfig(source="stdlib", length=128),
            optim=OptimConfig(learning_rate=2e-3, warmup_steps=50),
            train=TrainConfig(steps=1500, batch_size=8, eval_every=250, eval_batches=96),
            checkpoint=CheckpointConfig(every=250),
        )
    )
