"""Who should get a slot when there are too few: the first token, the surest one, or a random one?

Source: V-MoE (2106.05974), batch-prioritised routing; ST-MoE (2202.08906), table 18, for top-1: at a factor of 0.75
-1.428 in order and -1.409 by priority; it stops to matter above 1. All but `token` look at later tokens and are not
causal, in evaluation too: here they run with allow_non_causal, so a lower loss may be a look ahead.
python experiments/ablate.py --study=configs/ablations/drop_priority.py --workdir=runs/studies
Cost: toy 21 runs, about 8 minutes on two cores.
"""

from sparse_lm.study.claims import Less, Within
from sparse_lm.study.protocols import facts, moe
from sparse_lm.study.study import Source, Study, Variant


def _order(priority: str, factor: float = 0.75, paper: float | None = None) -> Variant:
    changes = moe(priority=priority, capacity_factor=factor, capacity_factor_eval=factor, allow_non_causal=True)
    return Variant(changes, paper)


STUDY = Study(
    name="drop_priority",
    question="Who should get a slot when there are too few?",
    source=Source("ST-MoE", "2202.08906", "table 18"),
    unit="-log perplexity on C4, higher is better",
    scales=facts(),
    variants={
        "token": _order("token", paper=-1.428),
        "batch": _order("batch", paper=-1.409),
        "random": _order("random"),
        "probability": _order("probability"),
        "token_1.25": _order("token", 1.25, -1.378),
        "batch_1.25": _order("batch", 1.25, -1.376),
    },
    claims=(
        Less("batch", "token", name="surest-first", statement="Priority by the surest choice beats order at 0.75."),
        Less("batch", "random", name="not-chance", statement="It beats chance too: the order matters, not the change."),
        Less("token_1.25", "token", name="room", statement="More capacity is better."),
        Within(
            "batch_1.25", "token_1.25", 0.05, name="no-matter", statement="With enough slots the order does not matter."
        ),
    ),
)
