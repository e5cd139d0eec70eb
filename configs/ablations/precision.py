"""Is bfloat16 with the router in float32 as good as float32 (selective precision)?

Source: Switch Transformer (2101.03961), table 2: float32 -1.718, selective -1.716, all bfloat16 -3.780 (diverged). The
last rounds all that the router computes as well; norms, the softmax of attention, the loss and the parameters are
float32 here in every arm. On CPUs bfloat16 is slower; the speed belongs to the small scale.
python experiments/ablate.py --study=configs/ablations/precision.py --workdir=runs/studies
Cost: toy 12 runs, about 7 minutes on two cores.
"""

from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.study.claims import Less, Within
from sparse_lm.study.protocols import moe, text
from sparse_lm.study.study import Source, Study, Variant

STUDY = Study(
    name="precision",
    question="Is bfloat16 with the router in float32 as good as float32?",
    source=Source("Switch Transformer", "2101.03961", "table 2"),
    unit="-log perplexity on C4, higher is better",
    scales=text(changes={"model__dtype": "float32"}),
    variants={
        "float32": Variant(paper=-1.718),
        "selective": Variant({"model__dtype": "bfloat16"}, paper=-1.716),
        "all_bfloat16": Variant({"model__dtype": "bfloat16", **moe(router=TopK(dtype="bfloat16"))}, paper=-3.780),
    },
    claims=(
        Within("selective", "float32", 0.01, name="as-good", statement="Selective precision is as good as float32."),
        Less("selective", "all_bfloat16", name="router", statement="A router in bfloat16 as well is worse."),
        Less("selective", "float32", name="faster", statement="It takes less time.", measure="seconds"),
    ),
)
