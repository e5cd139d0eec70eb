"""Does noise at the router's input or logits, so that experts are explored, help?

Source: Switch Transformer (2101.03961), table 11: argmax -1.471, sampling from the softmax -1.570, dropout of the
router's input -1.480 (at a rate that the table does not give; 0.1 here), jitter of 0.01 -1.468. ST-MoE (2202.08906),
table 3, finds jitter steadier and worse.
python experiments/ablate.py --study=configs/ablations/jitter.py --workdir=runs/studies
Cost: toy 21 runs, about 9 minutes on two cores.
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
        "sample": Variant(moe(router=TopK(sample=True)), paper=-1.570),
        "input_dropout": Variant(moe(router=TopK(input_dropout=0.1)), paper=-1.480),
        "jitter_0.01": Variant(moe(router=TopK(jitter=0.01)), paper=-1.468),
        "jitter_0.3": Variant(moe(router=TopK(jitter=0.3))),
        "logit_noise": Variant(moe(router=FixedNoise())),
    },
    claims=(
        Less("argmax", "sample", name="sampling", statement="Drawing experts is worse than taking the best."),
        Less("argmax", "input_dropout", name="dropout", statement="Dropout of the router's input is a little worse."),
        Within("jitter_0.01", "argmax", 0.01, name="neutral", statement="A jitter of 0.01 changes little."),
        Less("jitter_0.01", "argmax", name="helps", statement="It is a little better (-1.471 to -1.468)."),
        Less("jitter_0.01", "jitter_0.3", name="too-much", statement="Much noise is worse (ST-MoE)."),
    ),
)
