"""A decoder of the size of Switch-C (Fedus et al. 2021, 2101.03961, table 9): 1571B parameters in 2,048 experts, top-1.

python experiments/plan.py --config=configs/paper/switch_c_2048.py --topology=v5p:8x8x16
Switch-C has 15 layers of encoder and 15 of decoder, all sparse; here all 30 are a decoder's, without attention to an
encoder, and positions are rotated instead of a relative bias. No number of active parameters is published.
"""

from ml_collections import ConfigDict

from sparse_lm.config import to_config_dict
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import MeshConfig, TrainConfig

PUBLISHED = {"": ("1571B", "", "v5p:8x8x16")}  # total, active, slice


def get_config() -> ConfigDict:
    moe = MoEConfig(num_experts=2048, top_k=1, d_expert=6144, every=1, router=TopK(jitter=0.01))
    moe = moe.replace(capacity_factor=1.0, capacity_factor_eval=2.0, group_size=2048, dispatcher="all_to_all")
    model = ModelConfig(vocab_size=32_128, num_layers=30, d_model=2080, num_heads=32, head_dim=64, d_ff=6144, moe=moe)
    model = model.replace(activation="relu", tie_embeddings=False, dtype="bfloat16", remat="full")
    optim = OptimConfig(name="adafactor", learning_rate=0.01, schedule="rsqrt", warmup_steps=10_000, weight_decay=0.0)
    train = TrainConfig(steps=550_000, batch_size=1024, sample_tokens=0)
    data, mesh = DataConfig(length=2048), MeshConfig(data=1, fsdp=-1, expert=64)
    return to_config_dict(Experiment(model=model, data=data, optim=optim, train=train, mesh=mesh))
