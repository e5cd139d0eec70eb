"""Which layers should be sparse, with as many experts in all?

Source: GShard and Switch use every other layer, OpenMoE (2402.01739) every fourth or sixth, DeepSeekMoE (2401.06066)
all but the first; ST-MoE (2202.08906), table 16, finds that where extra layers stand matters little.
python experiments/ablate.py --study=configs/ablations/placement.py --workdir=runs/studies
Cost: toy 15 runs, about 8 minutes on two cores.
"""

from sparse_lm.study.claims import Less, Within
from sparse_lm.study.protocols import facts, moe
from sparse_lm.study.study import Source, Study, Variant

STUDY = Study(
    name="placement",
    question="Which layers should be sparse, with as many experts in all?",
    source=Source("ST-MoE", "2202.08906", "table 16; OpenMoE; DeepSeekMoE"),
    scales=facts(changes={"model__num_layers": 4}),
    variants={
        "every_1": Variant(moe(every=1, num_experts=4)),
        "every_2": Variant(moe(every=2, num_experts=8)),
        "every_4": Variant(moe(every=4, num_experts=16)),
        "last_2": Variant(moe(every=1, first_dense=2, num_experts=8)),
    },
    claims=(
        Less("every_2", "dense", name="helps", statement="Every other layer sparse beats dense."),
        Within("every_1", "every_2", 0.05, name="frequency", statement="How the experts are spread matters little."),
        Within("last_2", "every_2", 0.05, name="place", statement="Where they stand matters little."),
        Less("every_2", "every_4", name="too-few-layers", statement="One layer in four is not enough."),
    ),
    same_parameters=(("every_2", "last_2"),),
)
