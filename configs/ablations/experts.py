"""Do more experts lower the loss at equal FLOPs per token? Every token uses one expert of the dense layer's width.

Source: Switch Transformer (2101.03961), table 7 and figure 4; unified scaling laws (2202.01169) fit the same line.
python experiments/ablate.py --study=configs/ablations/experts.py --workdir=runs/studies
Cost: toy 18 runs, about 8 minutes on two cores.
"""

from sparse_lm.study.claims import Less, Monotone, Within
from sparse_lm.study.protocols import facts, moe
from sparse_lm.study.study import Source, Study, Variant

STUDY = Study(
    name="experts",
    question="Do more experts lower the loss at equal FLOPs per token?",
    source=Source("Switch Transformer", "2101.03961", "table 7, figure 4"),
    unit="-log perplexity on C4, higher is better",
    baseline_paper=-1.636,
    scales=facts(),
    variants={
        "e2": Variant(moe(num_experts=2)),
        "e4": Variant(moe(num_experts=4)),
        "e8": Variant(moe(num_experts=8)),
        "e16": Variant(moe(num_experts=16), paper=-1.505),
        "e32": Variant(moe(num_experts=32), paper=-1.474),
    },
    claims=(
        Less("e2", "dense", name="two-help", statement="Already two experts are better than the dense model."),
        Monotone(
            ("dense", "e2", "e4", "e8", "e16"),
            name="every-doubling",
            statement="The loss falls with every doubling of the number of experts.",
        ),
        Less("e32", "e16", name="still-at-32", statement="From 16 to 32 experts it still falls (-1.505 to -1.474)."),
        Within("e32", "e16", 0.05, name="saturates", statement="Gains get smaller as experts are added."),
    ),
    flop_tolerance=0.06,
)
