"""What do drops cost, against experts that take every token that is sent to them?

Source: MegaBlocks (2211.15841): dropping always costs loss, and no capacity factor beats dropless at equal steps.
python experiments/ablate.py --study=configs/ablations/dropless.py --workdir=runs/studies
Cost: toy 18 runs, about 5 minutes on two cores. Evaluation drops nothing in any variant.
"""

from sparse_lm.study.claims import Less, Within
from sparse_lm.study.protocols import facts, moe
from sparse_lm.study.study import Source, Study, Variant


def _factor(training: float | None) -> Variant:
    return Variant(moe(capacity_factor=training))


STUDY = Study(
    name="dropless",
    question="What do drops cost?",
    source=Source("MegaBlocks", "2211.15841", "dropless against dropping"),
    scales=facts(changes=moe(capacity_factor_eval=None)),
    variants={
        "0.5": _factor(0.5),
        "1": _factor(1.0),
        "1.5": _factor(1.5),
        "2": _factor(2.0),
        "dropless": _factor(None),
    },
    claims=(
        Less("1", "0.5", name="half", statement="Dropping half of the tokens is worse than few."),
        Less("dropless", "1", name="against-1", statement="Dropless beats a factor of 1."),
        Less("dropless", "1.5", name="against-1.5", statement="And of 1.5."),
        Within("dropless", "2", 0.02, name="against-2", statement="A factor of 2 comes close."),
        Less("1", "dropless", name="slots", statement="A factor of 1 takes less time.", measure="seconds"),
    ),
)
