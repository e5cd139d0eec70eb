"""DeepSeek-V3 (2412.19437): 671B parameters, 37B of them active; balance by a bias, latent attention.

python experiments/plan.py --config=configs/paper/deepseek_v3.py --topology=v5p:8x8x16
Pretraining at 4,096 tokens, before YaRN. 37B leaves out the table of input embeddings. Not there: prediction of the
token after the next (14B more), the ramp of the batch (this is its end) and 8-bit products; the rate falls on a cosine.
The paper drops no token. Without capacity a device has to have room for all that 64 devices may send, which does not
fit (docs/plans.md); here experts have room for 1.25 times an equal share.
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
from sparse_lm.train.config import MeshConfig, ShardingConfig, TrainConfig

PUBLISHED = {"": ("671B", "37B", "v5p:8x8x16")}  # total, active, slice


def get_config() -> ConfigDict:
    router = Sigmoid(num_groups=8, groups_kept=4)
    balance = BalanceConfig(load=1e-4, z=0.0, scope="sequence")
    moe = MoEConfig(num_experts=256, top_k=8, d_expert=2048, num_shared=1, every=1, first_dense=3, router=router)
    moe = moe.replace(capacity_factor=1.25, capacity_factor_eval=None, dispatcher="all_to_all", balance=balance)
    model = ModelConfig(vocab_size=129_280, num_layers=61, d_model=7168, num_heads=128, head_dim=128, d_ff=18_432)
    model = model.replace(heads=HeadsConfig(latent=LatentConfig(kv_rank=512, query_rank=1536)), moe=moe)
    model = model.replace(tie_embeddings=False, dtype="bfloat16", remat="full")
    optim = OptimConfig(learning_rate=2.2e-4, warmup_steps=2000, beta2=0.95)
    train = TrainConfig(steps=235_000, batch_size=15_360, accumulate=5, sample_tokens=0)
    sharding = ShardingConfig(strategy="fsdp_over_ep")
    data, mesh = DataConfig(length=4096), MeshConfig(data=1, fsdp=-1, expert=64)
    return to_config_dict(Experiment(model=model, data=data, optim=optim, train=train, mesh=mesh, sharding=sharding))
