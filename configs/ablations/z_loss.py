"""Does the router z-loss steady training at no cost in quality?

Source: ST-MoE (2202.08906), table 4: 4 of 6 runs stable without it, 3 of 3 with it, -1.755 to -1.741.
python experiments/ablate.py --study=configs/ablations/z_loss.py --workdir=runs/studies
Cost: toy 15 runs, about 5 minutes on two cores, at five times the usual learning rate.
"""

from sparse_lm.study.claims import Less, Within
from sparse_lm.study.protocols import moe, text
from sparse_lm.study.study import Source, Study, Variant


def _weight(z: float, paper: float | None = None) -> Variant:
    return Variant(moe(balance__z=z), paper)


STUDY = Study(
    name="z_loss",
    question="Does the router z-loss steady training at no cost in quality?",
    source=Source("ST-MoE", "2202.08906", "table 4"),
    unit="-log perplexity on C4, higher is better",
    scales=text(seeds=(3, 6, 3), changes={"optim__learning_rate": 2e-2}),
    variants={
        "0": _weight(0.0, -1.755),
        "0.0001": _weight(1e-4),
        "0.001": _weight(1e-3, -1.741),
        "0.01": _weight(1e-2),
    },
    claims=(
        Within("0.001", "0", 0.02, name="free", statement="It costs no quality."),
        Less("0.001", "0", name="better", statement="It is a little better (-1.755 to -1.741)."),
        Less("0.001", "0", name="steadier", statement="Gradients spike less.", measure="gradient_spikes"),
        Less("0.001", "0", name="logits", statement="It keeps logits small.", measure="router_z"),
    ),
)
