"""One expert per token for longer, or several full-width ones for fewer steps, at equal training FLOPs?

Source: ST-MoE (2202.08906), table 8: a second expert helps per step (-1.373 to -1.369 at a factor of 1.25), at more
FLOPs per token; the scaling laws of routed language models (2202.01169) recommend one.
python experiments/ablate.py --study=configs/ablations/equal_flops.py --workdir=runs/studies
Cost: toy 12 runs, about 5 minutes on two cores. Steps are cut until each variant's FLOPs are the dense baseline's.
"""

from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.study.claims import Less
from sparse_lm.study.protocols import facts, full_width, moe
from sparse_lm.study.study import Source, Study, Variant


def _wide(chosen: int) -> Variant:
    wide = moe(top_k=chosen, d_expert=full_width, router=TopK(renormalise="before_drop"), capacity_factor=1.25)
    return Variant(wide, matched=False)


STUDY = Study(
    name="equal_flops",
    question="One expert per token for longer, or several for fewer steps?",
    source=Source("Unified scaling laws for routed language models", "2202.01169", "recommendations"),
    budget="flops",
    scales=facts(),
    variants={"top_1": Variant(moe(capacity_factor=1.25)), "top_2": _wide(2), "top_4": _wide(4)},
    claims=(
        Less("top_1", "dense", name="sparse", statement="One expert of eight beats dense."),
        Less("top_1", "top_2", name="one-of-eight", statement="One is recommended over two."),
        Less("top_1", "top_4", name="one-not-four", statement="And over four."),
    ),
)
