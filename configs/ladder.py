"""A ladder of small models on bytes: 3 sizes x 4 numbers of experts x 3 budgets of equal FLOPs, to fit scaling laws to.

python experiments/ablate.py --study=configs/ladder.py --workdir=runs/studies
python experiments/scaling.py --law=joint --points=runs/studies/ladder/results.json --workdir=runs/scaling
`python experiments/scaling.py --ladder=configs/ladder.py` lists the runs, and their flags for experiments/train.py. The
scales differ in seeds only. Models of so few parameters are far from those of the papers: read the fit, not its optima.
"""

from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.config import MoEConfig
from sparse_lm.optim.config import OptimConfig
from sparse_lm.scaling.ladder import Ladder, Size, plan_ladder
from sparse_lm.study.study import Scale, Source, Study, Variant
from sparse_lm.train.config import CheckpointConfig, TrainConfig

BASE = Experiment(
    model=ModelConfig(
        num_layers=2,
        d_model=64,
        num_heads=4,
        d_ff=256,
        activation="gelu",
        moe=MoEConfig(num_experts=8, every=1, capacity_factor=2.0),
    ),
    data=DataConfig(source="stdlib", length=128, max_bytes=16_000_000),
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=22),
    train=TrainConfig(steps=440, batch_size=8, eval_batches=64, log_every=10),
    checkpoint=CheckpointConfig(keep=1, best=False),
)

LADDER = Ladder(
    base=BASE,
    sizes=(Size(2, 16, 2, 64), Size(2, 32, 2, 128), Size(2, 64, 4, 256)),
    experts=(1, 2, 4, 8),
    budgets=(5e10, 1e11, 2e11),
    min_steps=100,
)

STUDY = Study(
    name="ladder",
    question="How does the loss depend on size, experts and tokens?",
    source=Source("Joint MoE scaling laws", "2502.05172", "section 5"),
    scales={"toy": Scale(BASE, 1), "small": Scale(BASE, 3), "paper": Scale(BASE, 5)},
    variants={name: Variant(changes, matched=False) for name, changes in plan_ladder(LADDER).changes().items()},
    claims=(),
)
