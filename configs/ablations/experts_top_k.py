"""How many experts, and how many of them per token, at equal FLOPs? A grid; experts are d_ff / k wide.

Source: OLMoE (2409.02060), figure 5: 8x1 to 32x4 is a large gain, 64x8 a small one; grids as in ST-MoE (2202.08906).
python experiments/ablate.py --study=configs/ablations/experts_top_k.py --workdir=runs/studies
Cost: toy 30 runs, about 10 minutes on two cores. Names are experts x chosen; gates of several choices sum to 1.
"""

from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.study.claims import Less
from sparse_lm.study.protocols import facts, moe
from sparse_lm.study.study import Source, Study, Variant

RENORMALISED = TopK(renormalise="before_drop")


def _cell(experts: int, chosen: int) -> Variant:
    router = TopK() if chosen == 1 else RENORMALISED
    return Variant(moe(num_experts=experts, top_k=chosen, router=router))


STUDY = Study(
    name="experts_top_k",
    question="How many experts, and how many of them per token, at equal FLOPs?",
    source=Source("OLMoE", "2409.02060", "figure 5"),
    scales=facts(),
    variants={f"{e}x{k}": _cell(e, k) for k in (1, 2, 4) for e in (8, 16, 32)},
    claims=(
        Less(
            "32x4", "8x1", name="fine-grained", statement="32 experts of a quarter of the width beat 8 (iso-parameter)."
        ),
        Less("16x2", "8x1", name="half-way", statement="16 of half the width beat 8 as well (iso-parameter)."),
        Less("32x1", "8x1", name="experts-at-k1", statement="With one choice more experts are better."),
        Less("32x2", "8x2", name="experts-at-k2", statement="With two choices more experts are better."),
        Less("32x4", "8x4", name="experts-at-k4", statement="With four choices more experts are better."),
    ),
    flop_tolerance=0.06,
    same_parameters=(("8x1", "16x2", "32x4"), ("16x1", "32x2"), ("8x2", "16x4")),
)
