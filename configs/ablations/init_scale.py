"""Should experts and router start ten times smaller (in variance), for stability and a smaller spread over seeds?

Source: Switch Transformer (2101.03961), table 3: -2.72 ± 0.01 with 0.1, -3.60 ± 0.68 with 1.0 after 3,500 steps. There
the scale is that of all weights; here of experts and router.
python experiments/ablate.py --study=configs/ablations/init_scale.py --workdir=runs/studies
Cost: toy 16 runs, about 5 minutes on two cores.
"""

from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.study.claims import Less
from sparse_lm.study.protocols import moe, text
from sparse_lm.study.study import Source, Study, Variant


def _scale(scale: float, paper: float | None = None) -> Variant:
    return Variant(moe(init_scale=scale, router=TopK(init_scale=scale)), paper)


STUDY = Study(
    name="init_scale",
    question="Should experts and router start with a tenth of the variance?",
    source=Source("Switch Transformer", "2101.03961", "table 3"),
    unit="-log perplexity, higher is better",
    scales=text(seeds=(4, 5, 3), changes={"optim__learning_rate": 1e-2}),
    variants={"0.1": _scale(0.1, -2.72), "0.3": _scale(0.3), "1.0": _scale(1.0, -3.60)},
    claims=(
        Less("0.1", "1.0", name="small-init", statement="A tenth of the scale is better early in training."),
        Less("0.1", "1.0", name="steady", statement="And steadier.", measure="gradient_spikes"),
    ),
)
