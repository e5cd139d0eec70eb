"""Does expert choice look better than it is in a decoder, because an expert's choice looks at later tokens?

Source: loss-free balancing (2408.15664), on expert choice: an abnormal drop of the loss by about 10 %, more with
smaller groups. The control groups by position (2402.07871): tokens at one position of several rows, where nothing
leaks. The language has a known entropy, so that `entropy_gap` below 0 would prove a leak by itself.
python experiments/ablate.py --study=configs/ablations/expert_choice_leak.py --workdir=runs/studies
Cost: toy 15 runs, about 7 minutes on two cores.
"""

from sparse_lm.moe.routers.expert_choice import ExpertChoice
from sparse_lm.study.claims import Less, Within
from sparse_lm.study.protocols import domains, moe
from sparse_lm.study.study import Source, Study, Variant

FULL = moe(capacity_factor=1.0, capacity_factor_eval=1.0)
CHOICE = FULL | moe(router=ExpertChoice(), balance__load=0.0, balance__z=0.0)
IN_ROWS = CHOICE | moe(allow_non_causal=True)


STUDY = Study(
    name="expert_choice_leak",
    question="Does expert choice look better than it is in a decoder?",
    source=Source("Loss-free balancing", "2408.15664", "on leakage under expert choice"),
    scales=domains(changes={"train__batch_size": 32}),
    variants={
        "token_choice": Variant(FULL),
        "choice_in_rows": Variant(IN_ROWS),
        "choice_in_16": Variant(IN_ROWS | moe(group_size=16)),
        "choice_by_position": Variant(CHOICE | moe(grouping="position", group_size=32)),
    },
    claims=(
        Less(
            "choice_in_rows", "choice_by_position", name="leak", statement="Grouped in rows it gains from the future."
        ),
        Less("choice_in_16", "choice_in_rows", name="small-groups", statement="Smaller groups leak more."),
        Less("choice_in_rows", "token_choice", name="looks-better", statement="It seems to beat token choice."),
        Within("choice_by_position", "token_choice", 0.1, name="fair", statement="Without the leak the two are close."),
    ),
)
