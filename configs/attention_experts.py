"""Attention with experts, size of the quickstart: a mixture of attention heads (JetMoE), with experts in both parts.

python experiments/train.py --config=configs/attention_experts.py --workdir=runs/attention_experts
Variants: `attention` (experts in the attention alone), `switch_head` (SwitchHead instead, dense otherwise), and
`dense`, the twin of the first one: the same FLOPs per token but for the routers', without experts.
"""

from ml_collections import ConfigDict

from sparse_lm.config import to_config_dict
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.counts import dense_twin
from sparse_lm.moe.attention.mixture import Mixture
from sparse_lm.moe.attention.switch_head import SwitchHead
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import CheckpointConfig, TrainConfig

VARIANTS = ("both", "attention", "switch_head", "dense")


def get_config(variant: str = "both") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"configs/attention_experts.py:{variant}: the variants are {', '.join(VARIANTS)}")
    # As in JetMoE: dropless, two of eight experts in both parts, softmax over the chosen logits.
    moe = MoEConfig(
        num_experts=8,
        top_k=2,
        every=1,
        capacity_factor=None,
        capacity_factor_eval=None,
        router=TopK(gate="softmax_after"),
    )
    # Two experts of two heads each: four query heads per token over two heads of keys and values.
    model = ModelConfig(
        num_layers=4,
        d_model=128,
        num_heads=4,
        num_kv_heads=2,
        d_ff=512,
        activation="gelu",
        attention=Mixture(),
        moe=moe,
    )
    if variant == "attention":
        model = model.replace(moe=None)
    elif variant == "switch_head":
        model = model.replace(moe=None, num_kv_heads=None, attention=SwitchHead())
    elif variant == "dense":
        # The count needs a vocabulary; that of bytes is taken out again.
        model = dense_twin(model.replace(vocab_size=264)).replace(vocab_size=None)
    return to_config_dict(
        Experiment(
            model=model,
            data=DataConfig(source="stdlib", length=128),
            optim=OptimConfig(learning_rate=2e-3, warmup_steps=50),
            train=TrainConfig(steps=1500, batch_size=8, eval_every=250, eval_batches=96),
            checkpoint=CheckpointConfig(every=250),
        )
    )
