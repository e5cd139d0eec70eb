"""Over which tokens should loads be balanced: those of a sequence, or all of a step's batch?

Source: Demons in the detail (2501.11873), table 1: perplexity 8.167 when 4 sequences are balanced together, 8.038 with
512. Every row is of one of four languages, so that balance within a row forbids experts for a language.
python experiments/ablate.py --study=configs/ablations/balance_scope.py --workdir=runs/studies
Cost: toy 20 runs, about 5 minutes on two cores.
"""

from sparse_lm.study.claims import Less
from sparse_lm.study.protocols import domains, moe
from sparse_lm.study.study import Source, Study, Variant

STUDY = Study(
    name="balance_scope",
    question="Over which tokens should loads be balanced?",
    source=Source("Demons in the detail", "2501.11873", "table 1"),
    unit="perplexity, lower is better",
    scales=domains(seeds=(5, 5, 3), changes=moe(balance__load=0.1, capacity_factor=4.0, capacity_factor_eval=4.0)),
    variants={
        "sequence": Variant(moe(balance__scope="sequence"), paper=8.167),
        "global": Variant(moe(balance__scope="global"), paper=8.038),
        "none": Variant(moe(balance__load=0.0)),
    },
    claims=(
        Less("global", "sequence", name="global", statement="Balance over the whole batch beats balance per sequence."),
        Less("sequence", "none", name="both-balance", statement="Both balance.", measure="max_violation"),
    ),
)
