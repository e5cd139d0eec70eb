"""Does noise at the router's input or logits, so that experts are explored, help?

Source: Switch Transformer (2101.03961), table 11: argmax -1.471, jitter of 0.01 -1.468; sampling (-1.570) is not here.
ST-MoE (2202.08906), table 3, finds jitter steadier and worse.
python experiments/ablate.py --study=configs/ablations/jitter.py --workdir=runs/studies
Cost: toy 15 runs, about 5 minutes on two cores.
"""

from sparse_lm.moe.routers.fixed_noise import FixedNoise
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.study.claims import Less, Within
from sparse_lm.study.protocols import moe, text
from sparse_lm.study.study import Source, Study, Variant

STUDY = Study(
    name="jitter",
    question="Does noise in the choice of experts help?",
    source=Source("Switch Transformer", "2101.03961", "table 11"),
    unit="-log perplexity on C4, higher is better",
    scales=text(),
    variants={
        "argmax": Variant(paper=-1.471),
        "jitter_0.01": Variant(moe(router=TopK(jitter=0.01)), paper=-1.468),
        "jitter_0.3": Variant(moe(router=TopK(jitter=0.3))),
        "logit_noise": Variant(moe(router=FixedNoise())),
    },
    claims=(
        Within("jitter_0.01", "argmax", 0.01, name="neutral", statement="A jitter of 0.01 changes little."),
        Less("jitter_0.01", "argmax", name="helps", statement="It is a little better (-1.471 to -1.468)."),
        Less("jitter_0.01", "jitter_0.3", name="too-much", statement="Much noise is worse (ST-MoE)."),
    ),
)
