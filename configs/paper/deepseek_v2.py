"""DeepSeek-V2 (2405.04434): latent attention; 236B parameters, 21B active; V2-Lite 15.7B, 2.4B active.

python experiments/plan.py --config=configs/paper/deepseek_v2.py:v2 --topology=v5p:8x8x8
At 4,096 tokens, before YaRN; active counts leave out input embeddings. No losses nor drops per device, no batch ramp.
"""

from ml_collections import ConfigDict

from sparse_lm.config import to_config_dict
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.config import BalanceConfig, MoEConfig
from sparse_lm.moe.routers.sigmoid import Sigmoid
from sparse_lm.nn.config import HeadsConfig, LatentConfig
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import MeshConfig, TrainConfig

PUBLISHED = {"v2": ("236B", "21B", "v5p:8x8x8"), "lite": ("15.7B", "2.4B", "v5p:4x4x4")}  # total, active, slice


def get_config(variant: str = "v2") -> ConfigDict:
    if variant not in PUBLISHED:
        raise ValueError(f"the variants are {', '.join(PUBLISHED)}, not {variant}")
    lite = variant == "lite"
    router = Sigmoid(score="softmax", renormalise="none", scale=1.0 if lite else 16.0, bias_rate=0.0)
    if not lite:
        router = router.replace(num_groups=8, groups_kept=3, group_score="max")
    balance = BalanceConfig(load=0.001 if lite else 0.003, z=0.0, scope="sequence")
    moe = MoEConfig(num_experts=64 if lite else 160, top_k=6, d_expert=1408 if lite else 1536, num_shared=2, every=1)
    moe = moe.replace(first_dense=1, router=router, balance=balance, capacity_factor=None, capacity_factor_eval=None)
    model = ModelConfig(vocab_size=102_400, num_layers=27 if lite else 60, d_model=2048 if lite else 5120, moe=moe)
    model = model.replace(num_heads=16 if lite else 128, head_dim=128, d_ff=10_944 if lite else 12_288)
    model = model.replace(heads=HeadsConfig(latent=LatentConfig(kv_rank=512, query_rank=None if lite else 1536)))
    model = model.replace(tie_embeddings=False, dtype="bfloat16", remat="full", moe__dispatcher="ragged_all_to_all")
    optim = OptimConfig(learning_rate=4.2e-4 if lite else 2.4e-4, warmup_steps=2000, beta2=0.95)
    rows, cuts, ways = (4608, 8, 4) if lite else (9216, 6, 8)
    train = TrainConfig(steps=300_000, batch_size=rows, accumulate=cuts, sample_tokens=0)
    data, mesh = DataConfig(length=4096), MeshConfig(data=1, fsdp=-1, expert=ways)
    return to_config_dict(Experiment(model=model, data=data, optim=optim, train=train, mesh=mesh))
