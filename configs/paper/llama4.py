"""Llama 4 (Meta 2025; model cards, no paper): Scout, 109B parameters, and Maverick, 400B; 17B active in both.

python experiments/plan.py --config=configs/paper/llama4.py:maverick --topology=v5p:8x8x8
The published counts include an image encoder (about 0.9B), which is not there. Nor are Scout's scaled rotation for rows
beyond 8,192 and the scores that grow with the position in layers that do not rotate. Optimizer and balance are ours.
"""

from ml_collections import ConfigDict

from sparse_lm.config import to_config_dict
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers.sigmoid import Sigmoid
from sparse_lm.nn.config import HeadsConfig
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import MeshConfig, TrainConfig

PUBLISHED = {"scout": ("109B", "17B", "v5p:4x8x8"), "maverick": ("400B", "17B", "v5p:8x8x8")}  # total, active, slice


def get_config(variant: str = "scout") -> ConfigDict:
    if variant not in PUBLISHED:
        raise ValueError(f"the variants are {', '.join(PUBLISHED)}, not {variant}")
    scout = variant == "scout"
    router = Sigmoid(renormalise="none", scale=1.0, bias_rate=0.0, gate_on="input")
    moe = MoEConfig(num_experts=16 if scout else 128, top_k=1, d_expert=8192, num_shared=1, every=1 if scout else 2)
    moe = moe.replace(capacity_factor=None, capacity_factor_eval=None, dispatcher="ragged_all_to_all", router=router)
    heads = HeadsConfig(chunks=(8192, 8192, 8192, None), rotated=(True, True, True, False))
    model = ModelConfig(vocab_size=202_048, num_layers=48, d_model=5120, num_heads=40, num_kv_heads=8, d_ff=16_384)
    model = model.replace(rope_base=5e5, norm_eps=1e-5, heads=heads.replace(qk_norm="l2" if scout else "none"))
    model = model.replace(tie_embeddings=False, dtype="bfloat16", remat="full", moe=moe)
    optim = OptimConfig(learning_rate=3e-4, warmup_steps=2000, beta2=0.95)
    train = TrainConfig(steps=500_000, batch_size=1024, accumulate=2 if scout else 1, sample_tokens=0)
    data, mesh = DataConfig(length=8192), MeshConfig(data=1, fsdp=-1, expert=8)
    return to_config_dict(Experiment(model=model, data=data, optim=optim, train=train, mesh=mesh))
