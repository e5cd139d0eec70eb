"""Every router of the literature at the size of the quickstart, each with the settings of its paper.

python experiments/train.py --config=configs/routers.py:deepseek_v3 --workdir=runs/deepseek_v3
`:dense` is the dense twin of all of them: the same FLOPs per token beside router and shared experts. docs/routers.md
names the papers. Routers that look at other tokens are grouped by position across rows, which keeps them causal.
"""

from typing import Any

from ml_collections import ConfigDict

from sparse_lm.config import to_config_dict
from sparse_lm.data.config import DataConfig
from sparse_lm.data.counts import token_counts
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.counts import dense_twin
from sparse_lm.moe.config import BalanceConfig, MoEConfig
from sparse_lm.moe.routers.base import RouterConfig
from sparse_lm.moe.routers.base_layer import Base
from sparse_lm.moe.routers.expert_choice import ExpertChoice
from sparse_lm.moe.routers.fixed_noise import FixedNoise
from sparse_lm.moe.routers.hash import Hash
from sparse_lm.moe.routers.noisy_top_k import NoisyTopK
from sparse_lm.moe.routers.prototype import Prototype
from sparse_lm.moe.routers.relu import Relu
from sparse_lm.moe.routers.sigmoid import Sigmoid
from sparse_lm.moe.routers.sinkhorn import Sinkhorn
from sparse_lm.moe.routers.soft import SoftMixture
from sparse_lm.moe.routers.sparse_mixer import SparseMixer
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import CheckpointConfig, TrainConfig

NONE = BalanceConfig(load=0.0, z=0.0)  # the router's own losses, or none
DROPLESS: dict[str, Any] = {"capacity_factor": None, "capacity_factor_eval": None}
BY_POSITION: dict[str, Any] = {
    "grouping": "position",
    "group_size": 8,
    "capacity_factor": 1.0,
    "capacity_factor_eval": 1.0,
}
DATA = DataConfig(source="stdlib", length=128)


def moe(top_k: int, router: RouterConfig, num_experts: int = 8, **options: Any) -> MoEConfig:
    """A sparse layer of the quickstart's size."""
    return MoEConfig(num_experts=num_experts, top_k=top_k, router=router, **options)


def layers() -> dict[str, MoEConfig]:
    """The sparse layer of each variant but `hash_balanced`, which reads the data.

    Two settings are not the papers', whose runs are a hundred times longer: a bias moves by 0.01 per step, and the
    scale of Soft MoE starts at 10, where its cosines make a difference from the start.
    """
    return {
        "switch": moe(1, TopK(jitter=0.01)),
        "gshard": moe(2, TopK(second_expert="gshard", renormalise="before_drop"), capacity_factor=1.0),
        "st_moe": moe(2, TopK(second_expert="mesh_tf", renormalise="before_drop")),
        "mixtral": moe(2, TopK(gate="softmax_after"), **DROPLESS),
        "olmoe": moe(4, TopK(), 32, **DROPLESS),
        "qwen2": moe(4, TopK(), 32, num_shared=2, shared_gate="sigmoid", **DROPLESS),
        "qwen3": moe(4, TopK(renormalise="before_drop"), 32, **DROPLESS),
        "residual": moe(1, TopK(), num_shared=1, shared_gate="mix"),
        "gpt_oss": moe(4, TopK(gate="softmax_after", bias=True), 32, expert_bias=True, **DROPLESS),
        "deepseek_v2": moe(4, Sigmoid("softmax", "none", 1.0, 4, 3, "max", 0.0), 32, num_shared=1, **DROPLESS),
        "deepseek_v3": moe(
            4, Sigmoid(num_groups=4, groups_kept=2, bias_rate=0.01), 32, num_shared=1, balance=NONE, **DROPLESS
        ),
        "llama4": moe(1, Sigmoid("sigmoid", "none", 1.0, bias_rate=0.0, gate_on="input"), num_shared=1, **DROPLESS),
        "remoe": moe(1, Relu(), balance=NONE, **DROPLESS),
        "sparse_mixer": moe(2, SparseMixer(jitter=0.1), **DROPLESS),
        "noisy_top_k": moe(2, NoisyTopK(), balance=NONE),
        "v_moe": moe(2, FixedNoise(), balance=NONE, capacity_factor=1.05),
        "m6_t": moe(2, Prototype()),
        "hash": moe(1, Hash(), **DROPLESS),
        "hash_bigram": moe(1, Hash(mode="bigram"), **DROPLESS),
        "expert_choice": moe(2, ExpertChoice(), balance=NONE, **BY_POSITION),
        "expert_choice_capped": moe(2, ExpertChoice(max_experts=3), balance=NONE, **BY_POSITION),
        "s_base": moe(1, Sinkhorn(), balance=NONE, **BY_POSITION).replace(
            capacity_factor=2.0, capacity_factor_eval=None
        ),
        "base": moe(1, Base(), balance=NONE, **BY_POSITION).replace(capacity_factor_eval=None),
        "soft": moe(1, SoftMixture(scale=10.0), balance=NONE, dispatcher="einsum", **BY_POSITION),
    }


def get_config(variant: str = "switch") -> ConfigDict:
    known = layers()
    if variant == "hash_balanced":
        known[variant] = moe(1, Hash(mode="balanced", frequencies=token_counts(DATA)), **DROPLESS)
    elif variant not in (*known, "dense"):
        variants = ", ".join((*known, "hash_balanced", "dense"))
        raise ValueError(f"configs/routers.py:{variant}: the variants are {variants}")
    model = ModelConfig(num_layers=4, d_model=128, num_heads=4, d_ff=512, activation="gelu")
    sparse = model.replace(moe=known.get(variant, known["switch"]))
    if variant == "gpt_oss":
        sparse = sparse.replace(activation="clamped_swiglu")
    return to_config_dict(
        Experiment(
            model=dense_twin(sparse) if variant == "dense" else sparse,
            data=DATA,
            optim=OptimConfig(learning_rate=2e-3, warmup_steps=50),
            train=TrainConfig(steps=1500, batch_size=8, eval_every=250, eval_batches=96),
            checkpoint=CheckpointConfig(every=250),
        )
    )
