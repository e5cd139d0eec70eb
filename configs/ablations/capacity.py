"""What does a capacity cost in training and in evaluation, for one and for two experts per token?

Source: ST-MoE (2202.08906), table 8. Its capacity leaves out k: its factor for top-2 is twice ours, so `k2_1_2` has 0.5
and 1 here. Its top-2 uses two experts of full width, twice the FLOPs, hence matched=False.
python experiments/ablate.py --study=configs/ablations/capacity.py --workdir=runs/studies
Cost: toy 21 runs, about 6 minutes on two cores, and 6 evaluations of them. Names are k, the factor in training, the
factor in evaluation; what differs in the latter alone is trained once.
"""

from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.study.claims import Less
from sparse_lm.study.protocols import facts, full_width, moe
from sparse_lm.study.study import Source, Study, Variant


def _one(training: float, evaluation: float, paper: float | None = None) -> Variant:
    return Variant(moe(capacity_factor=training, capacity_factor_eval=evaluation), paper)


def _again(trained: str, evaluation: float, paper: float) -> Variant:
    return Variant(moe(capacity_factor_eval=evaluation), paper, evaluates=trained)


def _two(training: float, evaluation: float, paper: float) -> Variant:
    both = moe(capacity_factor=training / 2, capacity_factor_eval=evaluation / 2)
    return Variant(
        {**both, **moe(top_k=2, d_expert=full_width, router=TopK(renormalise="before_drop"))}, paper, matched=False
    )


STUDY = Study(
    name="capacity",
    question="What does a capacity cost in training and in evaluation?",
    source=Source("ST-MoE", "2202.08906", "table 8"),
    unit="-log perplexity on C4, higher is better",
    baseline_paper=-1.474,
    scales=facts(),
    variants={
        "k1_0.75_0.75": _one(0.75, 0.75, -1.428),
        "k1_0.75_2": _again("k1_0.75_0.75", 2, -1.404),
        "k1_1_1": _one(1, 1, -1.397),
        "k1_1_2": _again("k1_1_1", 2, -1.384),
        "k1_1.25_2": _one(1.25, 2, -1.373),
        "k1_2_2": _one(2, 2),
        "k2_1_2": _two(1, 2, -1.378),
        "k2_2_2": _two(2, 2, -1.360),
    },
    claims=(
        Less("k1_1_2", "k1_0.75_2", name="training", statement="More capacity in training is better (0.75 to 1)."),
        Less("k1_1.25_2", "k1_1_2", name="training-1.25", statement="And from 1 to 1.25."),
        Less("k1_0.75_2", "k1_0.75_0.75", name="evaluation", statement="Evaluating with more than in training helps."),
        Less("k1_1_2", "k1_1_1", name="evaluation-at-1", statement="Also from a factor of 1."),
        Less("k2_1_2", "k1_1_2", name="second-expert", statement="A second expert helps at equally many slots."),
        Less("k2_2_2", "k2_1_2", name="room-for-second", statement="It helps more when there is room for it."),
    ),
)
