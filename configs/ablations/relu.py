"""Can gates be ReLU instead of top-k softmax, with a penalty that steers how many experts are used?

Source: ReMoE (2412.14711), table 2 (mean accuracy: dense 38.20, dropless top-k 39.67, ReMoE 40.03), E=8, k=1.
python experiments/ablate.py --study=configs/ablations/relu.py --workdir=runs/studies
Cost: toy 9 runs, about 5 minutes on two cores. FLOPs are counted at the number of experts that the penalty aims at; in
the first hundred steps more are used.
"""

from sparse_lm.moe.routers.relu import Relu
from sparse_lm.study.claims import Less
from sparse_lm.study.protocols import moe, text
from sparse_lm.study.study import Source, Study, Variant

DROPLESS = moe(capacity_factor=None, capacity_factor_eval=None)

STUDY = Study(
    name="relu",
    question="Can gates be ReLU instead of top-k softmax?",
    source=Source("ReMoE", "2412.14711", "table 2"),
    unit="mean accuracy in %, higher is better",
    baseline_paper=38.20,
    scales=text(changes=DROPLESS),
    variants={
        "top_1": Variant(paper=39.67),
        "relu": Variant(moe(router=Relu(), balance__load=0.0, balance__z=0.0), paper=40.03),
    },
    claims=(
        Less("top_1", "dense", name="sparse-helps", statement="Top-1 beats dense."),
        Less("relu", "dense", name="relu-helps", statement="ReLU routing beats dense."),
        Less("relu", "top_1", name="relu-better", statement="It beats top-1."),
    ),
)
