"""Can a bias on the router's choice balance loads without a loss that pulls on the gradient?

Source: loss-free balancing (2408.15664), table 2 (1B): perplexity 9.56 to 9.50, MaxVio 0.72 to 0.04.
python experiments/ablate.py --study=configs/ablations/loss_free_bias.py --workdir=runs/studies
Cost: toy 15 runs, about 7 minutes on two cores. The paper's rate of 0.001 is for 1e4 steps and more.
"""

from sparse_lm.moe.routers.sigmoid import Sigmoid
from sparse_lm.study.claims import Less, Within
from sparse_lm.study.protocols import moe, text
from sparse_lm.study.study import Source, Study, Variant


def _balanced(rate: float, load: float, paper: float | None = None) -> Variant:
    return Variant(moe(router=Sigmoid(scale=1.0, bias_rate=rate), balance__load=load, balance__z=0.0), paper)


STUDY = Study(
    name="loss_free_bias",
    question="Can a bias on the choice balance loads without a balance loss?",
    source=Source("Loss-free balancing", "2408.15664", "table 2"),
    unit="perplexity, lower is better",
    scales=text(changes=moe(num_experts=16, top_k=4)),
    variants={
        "loss": _balanced(0.0, 0.01, paper=9.56),
        "bias_0.001": _balanced(0.001, 0.0, paper=9.50),
        "bias_0.01": _balanced(0.01, 0.0),
        "neither": _balanced(0.0, 0.0),
    },
    claims=(
        Less("bias_0.01", "loss", name="better", statement="The bias costs less than the balance loss (9.50 to 9.56)."),
        Within("bias_0.01", "loss", 0.02, name="as-good", statement="It is at least as good."),
        Less("bias_0.01", "loss", name="balance", statement="It balances better (0.04).", measure="max_violation"),
        Less("bias_0.01", "neither", name="works", statement="It balances at all.", measure="max_violation"),
    ),
    flop_tolerance=0.06,
)
