"""Do experts that cost nothing (zero, copy, constant) beside the feed-forward ones keep the quality at fewer FLOPs?

Source: MoE++ (2410.07348), table 3 (0.6B, mean of nine tasks: 8 experts 44.3; with free ones tau 0.25 44.9, 0.75 45.6,
1.0 44.5). A smaller tau sends fewer tokens to feed-forward experts.
python experiments/ablate.py --study=configs/ablations/moe_plus_plus.py --workdir=runs/studies
Cost: toy 15 runs, about 6 minutes on two cores. FLOPs are counted at the loads that the balance loss aims at; all
variants differ in them by design.
"""

from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.study.claims import Less
from sparse_lm.study.protocols import moe, text
from sparse_lm.study.study import Source, Study, Variant

TOP_2 = moe(top_k=2, capacity_factor=1.1, balance__z=0.0)


def _free(tau: float, paper: float) -> Variant:
    changes = moe(num_zero=1, num_copy=1, num_constant=2, free_share=tau, router=TopK(pathway=True))
    return Variant(changes, paper, matched=False)


STUDY = Study(
    name="moe_plus_plus",
    question="Do experts that cost nothing keep the quality at fewer FLOPs?",
    source=Source("MoE++", "2410.07348", "table 3"),
    unit="mean accuracy in %, higher is better",
    scales=text(changes=TOP_2),
    variants={
        "ordinary": Variant(paper=44.3),
        "tau_0.25": _free(0.25, 44.9),
        "tau_0.75": _free(0.75, 45.6),
        "tau_1.0": _free(1.0, 44.5),
    },
    claims=(
        Less("tau_0.75", "ordinary", name="free-helps", statement="Free experts lower the loss at fewer FLOPs."),
        Less("tau_0.75", "tau_0.25", name="too-few", statement="Too few feed-forward tokens cost quality."),
        Less("tau_0.75", "tau_1.0", name="middle", statement="A share below 1 is best."),
    ),
)
