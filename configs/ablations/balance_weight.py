"""How heavy should the load-balance loss be, and what happens without it?

Source: OLMoE (2409.02060), figures 9 and 10 (without: collapse to one or two experts); Switch (2101.03961) swept 1e-1
to 1e-5 and chose 1e-2.
python experiments/ablate.py --study=configs/ablations/balance_weight.py --workdir=runs/studies
Cost: toy 15 runs, about 9 minutes on two cores.
"""

from sparse_lm.study.claims import Between, Less
from sparse_lm.study.protocols import moe, text
from sparse_lm.study.study import Source, Study, Variant


def _weight(load: float) -> Variant:
    return Variant(moe(balance__load=load))


STUDY = Study(
    name="balance_weight",
    question="How heavy should the load-balance loss be, and what happens without it?",
    source=Source("OLMoE", "2409.02060", "figures 9 and 10"),
    scales=text(changes=moe(capacity_factor=1.25)),
    variants={"0": _weight(0), "0.001": _weight(0.001), "0.01": _weight(0.01), "0.1": _weight(0.1)},
    claims=(
        Less("0.01", "0", name="needed", statement="Without a balance loss the loss is worse."),
        Between("0", low=0.5, name="collapse", statement="Without it experts die.", measure="dead_experts"),
        Between("0.01", high=0.5, name="alive", statement="With 0.01 all live.", measure="dead_experts"),
        Less("0.01", "0", name="balance", statement="It lowers the imbalance.", measure="max_violation"),
        Less("0.01", "0", name="drops", statement="It lowers the share of drops.", measure="dropped"),
        Less("0.01", "0.1", name="too-heavy", statement="Ten times as heavy is worse."),
    ),
)
