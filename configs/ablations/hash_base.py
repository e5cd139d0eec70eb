"""Does a learned router beat a fixed hash, and balanced assignment (BASE, Sinkhorn) the balance loss?

Source: DeepSeekMoE (2401.06066), table 1 (Pile loss); BASE (2103.16716), hash layers (2106.04426), scaling laws of
routed models (2202.01169: all three within a narrow band). Groups are by position, which keeps all four causal.
python experiments/ablate.py --study=configs/ablations/hash_base.py --workdir=runs/studies
Cost: toy 15 runs, about 6 minutes on two cores. Early in training a hash by byte wins: short runs contradict the paper.
"""

from sparse_lm.moe.routers.base_layer import Base
from sparse_lm.moe.routers.hash import Hash
from sparse_lm.moe.routers.sinkhorn import Sinkhorn
from sparse_lm.study.claims import Less, Within
from sparse_lm.study.protocols import moe, text
from sparse_lm.study.study import Source, Study, Variant

NO_LOSS = moe(balance__load=0.0, balance__z=0.0)

STUDY = Study(
    name="hash_base",
    question="Does a learned router beat a fixed hash, and balanced assignment the balance loss?",
    source=Source("DeepSeekMoE", "2401.06066", "table 1"),
    unit="Pile loss, lower is better",
    baseline_paper=2.060,
    scales=text(changes=moe(grouping="position", group_size=16)),
    variants={
        "switch": Variant(paper=1.881),
        "hash": Variant(moe(router=Hash()), paper=1.932),
        "base": Variant(moe(router=Base()) | NO_LOSS),
        "sinkhorn": Variant(moe(router=Sinkhorn()) | NO_LOSS),
    },
    claims=(
        Less("hash", "dense", name="hash-helps", statement="Experts by a hash beat the dense model (1.932 to 2.060)."),
        Less("switch", "dense", name="switch-helps", statement="A learned router does too (1.881)."),
        Less("switch", "hash", name="learned", statement="A learned router beats a hash (1.881 to 1.932)."),
        Within("base", "switch", 0.05, name="base", statement="BASE does as well as Switch without a balance loss."),
        Within("sinkhorn", "switch", 0.05, name="sinkhorn", statement="So does Sinkhorn."),
        Less("base", "switch", name="balance", statement="BASE's loads are equal.", measure="max_violation"),
    ),
)
