"""At equal training time rather than equal steps: Switch, top-2 with full-width experts, or dense?

Source: Switch Transformer (2101.03961), table 1: hours to a given loss (T5-Large 131, top-2 80.1, Switch 62.8 at
a factor of 1).
python experiments/ablate.py --study=configs/ablations/equal_time.py --workdir=runs/studies
Cost: toy 15 runs, about 10 minutes on two cores; nothing else should run meanwhile. Runs are read at the training time
of the one that was done first, so the learning rate is constant.
"""

from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.study.claims import Less
from sparse_lm.study.protocols import facts, full_width, moe
from sparse_lm.study.study import Source, Study, Variant

TOP_2 = moe(top_k=2, d_expert=full_width, router=TopK(renormalise="before_drop"))

STUDY = Study(
    name="equal_time",
    question="At equal training time: Switch, top-2, or dense?",
    source=Source("Switch Transformer", "2101.03961", "table 1"),
    unit="hours to a given loss, lower is better",
    budget="time",
    scales=facts(changes={"optim__schedule": "constant"}),
    variants={
        "switch_1.0": Variant(moe(capacity_factor=1.0), paper=62.8),
        "switch_2.0": Variant(moe(capacity_factor=2.0), paper=72.8),
        "top2_1.0": Variant(TOP_2 | moe(capacity_factor=1.0), paper=68.7, matched=False),
        "top2_0.5": Variant(TOP_2 | moe(capacity_factor=0.5), paper=80.1, matched=False),
    },
    claims=(
        Less("switch_1.0", "dense", name="switch", statement="Switch is better than dense at equal time."),
        Less("switch_1.0", "switch_2.0", name="lean", statement="A factor of 1 beats one of 2 at equal time."),
        Less("switch_1.0", "top2_0.5", name="one-expert", statement="Switch beats top-2 at equal slots and time."),
        Less("switch_1.0", "top2_1.0", name="speed", statement="Switch takes less time a step.", measure="seconds"),
    ),
)
