"""Many narrow experts or few wide ones, and should some of them see every token?

Source: DeepSeekMoE (2401.06066), figure 3 and table 1; fine-grained scaling laws (2402.07871); OLMoE (2409.02060) found
a shared expert slightly worse.
python experiments/ablate.py --study=configs/ablations/granularity.py --workdir=runs/studies
Cost: toy 18 runs, about 9 minutes on two cores. Equal FLOPs and, without the shared one, equal parameters.
"""

from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.study.claims import Less, Within
from sparse_lm.study.protocols import facts, moe, share_of_width
from sparse_lm.study.study import Source, Study, Variant


def _grain(grain: int) -> Variant:
    router = TopK() if grain == 1 else TopK(renormalise="before_drop")
    return Variant(moe(num_experts=8 * grain, top_k=grain, router=router))


SHARED = moe(num_experts=31, top_k=3, num_shared=1, d_expert=share_of_width(4), router=TopK(renormalise="before_drop"))

STUDY = Study(
    name="granularity",
    question="Many narrow experts or few wide ones, and should some of them see every token?",
    source=Source("DeepSeekMoE", "2401.06066", "figure 3, table 1"),
    scales=facts(),
    variants={"8x1": _grain(1), "16x2": _grain(2), "32x4": _grain(4), "64x8": _grain(8), "31x3+1": Variant(SHARED)},
    claims=(
        Less("16x2", "8x1", name="half", statement="Experts half as wide, twice as many of them, are better."),
        Less("32x4", "8x1", name="quarter", statement="A quarter as wide as well."),
        Less("32x4", "16x2", name="finer", statement="Finer is better still."),
        Within("64x8", "32x4", 0.05, name="saturates", statement="From 32x4 to 64x8 there is little more to gain."),
        Within(
            "31x3+1", "32x4", 0.05, name="shared", statement="A shared expert changes little (OLMoE: a little worse)."
        ),
    ),
    same_parameters=(("8x1", "16x2", "32x4", "64x8", "31x3+1"),),
    flop_tolerance=0.12,
    notes="Gates sum to 1 where several experts are chosen, which one choice does not allow: a part of the step from "
    "8x1 may be that. The tolerance leaves room for the router of 64 experts.",
)
