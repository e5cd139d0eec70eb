"""Grok-1 (xAI 2024; released code, no paper): 314B parameters in 8 experts, 2 per token.

python experiments/plan.py --config=configs/paper/grok_1.py --topology=v5p:8x8x8
The publisher says that a quarter of the weights are active and gives no number. The scales of embeddings and logits of
the release are not there; the training is not published, optimizer and balance are ours. Nothing is dropped.
"""

from ml_collections import ConfigDict

from sparse_lm.config import to_config_dict
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.config import MoEConfig
from sparse_lm.nn.config import HeadsConfig
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import MeshConfig, TrainConfig

PUBLISHED = {"": ("314B", "", "v5p:8x8x8")}  # total, active, slice


def get_config() -> ConfigDict:
    moe = MoEConfig(num_experts=8, top_k=2, d_expert=32_768, every=1)
    moe = moe.replace(capacity_factor=None, capacity_factor_eval=None, dispatcher="ragged_all_to_all")
    model = ModelConfig(vocab_size=131_072, num_layers=64, d_model=6144, num_heads=48, num_kv_heads=8, d_ff=32_768)
    model = model.replace(activation="geglu", norm_position="sandwich", norm_eps=1e-5, heads=HeadsConfig(soft_cap=30.0))
    model = model.replace(tie_embeddings=True, dtype="bfloat16", remat="full", moe=moe)
    optim = OptimConfig(learning_rate=2e-4, warmup_steps=2000, beta2=0.95)
    train = TrainConfig(steps=250_000, batch_size=1024, sample_tokens=0)
    data, mesh = DataConfig(length=4096), MeshConfig(data=1, fsdp=-1, expert=8)
    return to_config_dict(Experiment(model=model, data=data, optim=optim, train=train, mesh=mesh))
