"""Tells what a run will need, without training: bytes per device, collectives, FLOPs and the least time of its step.

python experiments/plan.py --config=configs/paper/mixtral_8x7b.py --topology=v5p:4x4x4  [--largest=10] [--json=FILE]
python experiments/plan.py --config=configs/quickstart.py --config.mesh.expert=4 --devices=8  [--nocompile]
python experiments/plan.py --config=configs/quickstart.py --topology=v5e:4x4 --out=plans --nocompile
    --sweep="num_experts=8,64 top_k=1,2 mesh.expert=4,8"

--topology compiles for a TPU slice on a host without one (pip install 'sparse_lm[tpu-plan]'); without the compiler, and
for GPUs (h100:8), it estimates. --devices=N plans for N virtual CPU devices. --nocompile only estimates. No data are
read. See docs/plans.md.
"""

import os
from pathlib import Path

from absl import flags
from common import WITHOUT_A_TPU, define_config, experiment, run

CONFIG = define_config()
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Slice to plan for: v5e:4x4, v5p:4x4x4, h100:8. Default: what is here."
)
COMPILE = flags.DEFINE_bool("compile", True, "Compile the train step; otherwise formulas estimate what it needs.")
ADVISE = flags.DEFINE_bool("advise", True, "Look for the nearest change that fits where the plan does not.")
LARGEST = flags.DEFINE_integer("largest", 0, "List so many of the largest arrays of the compiled step.", 0, 40)
SWEEP = flags.DEFINE_string("sweep", None, 'Plan all combinations: "num_experts=8,64 topology=v5e:4x4,v5p:2x2x4".')
OUT = flags.DEFINE_string("out", None, "Folder for the sweep's plan.csv, plan.md and plan.svg.")
JSON = flags.DEFINE_string("json", None, "Write every number of a plan to this file.")
flags.mark_flag_as_required("config")


def main() -> None:
    """Prints the plan or the table of plans, and writes them where asked to."""
    import jax

    from sparse_lm.planning import advice, describe, record, sweep
    from sparse_lm.planning.plan import plan_here, plan_topology, resolve

    if TOPOLOGY.value or "topology=" in (SWEEP.value or ""):
        jax.config.update("jax_platforms", "cpu")  # described devices need no real ones
    config = resolve(experiment(CONFIG.value))

    def planner(changed, topology, compile_step):
        name = topology or TOPOLOGY.value
        return plan_topology(changed, name, compile_step) if name else plan_here(changed, compile_step)

    if SWEEP.value:
        compiled = COMPILE.value
        axes = sweep.parse_sweep(SWEEP.value)
        rows = sweep.sweep(config, axes, lambda changed, topology: planner(changed, topology, compiled))
        print(sweep.to_markdown(rows), end="")
        if OUT.value:
            sweep.write(rows, Path(OUT.value))
        return
    plan = planner(config, None, COMPILE.value)
    print(describe.describe(plan, config, LARGEST.value))
    if plan.fits is False and ADVISE.value:
        found = advice.advise(
            config, plan, lambda changed, compiled: planner(changed, None, compiled and COMPILE.value)
        )
        print(f"\n{found.text()}")
    if JSON.value:
        record.write(Path(JSON.value), record.describe(plan, config, TOPOLOGY.value))


if __name__ == "__main__":
    for name, value in WITHOUT_A_TPU.items():
        os.environ.setdefault(name, value)
    run(main)
