"""Runs a study: every variant and seed that is not finished, then (and meanwhile) its table, plots, verdicts and page.

python experiments/ablate.py --study=configs/ablations/experts.py --workdir=runs/studies
    [--scale=toy|small|paper] [--seeds=5] [--list] [--retry] [--devices=8]
    [--shard=0/8] [--parallel=2 | --ray=local|auto|HOST:PORT --per_run=CPU=2,GPU=1]

The same command goes on where it was stopped; finished runs are never repeated. docs/studies.md tells more.
"""

import os
import shlex
import sys
from pathlib import Path

from absl import flags
from common import run

STUDY = flags.DEFINE_string("study", None, "File of the study, one of configs/ablations/.")
WORKDIR = flags.DEFINE_string("workdir", None, "Studies are kept here, each in a folder of its name.")
SCALE = flags.DEFINE_string("scale", "toy", "toy (minutes on two cores), small (a GPU) or paper (a pod).")
SEEDS = flags.DEFINE_integer("seeds", None, "Seeds per variant; left out: the scale's.", 1)
LIST = flags.DEFINE_bool("list", False, "Only name the runs and say how far they are.")
RETRY = flags.DEFINE_bool("retry", False, "Try runs again that failed.")
PARALLEL = flags.DEFINE_integer("parallel", 1, "Processes side by side on this machine.", 1)
SHARD = flags.DEFINE_string("shard", "0/1", "Do every n-th run only, from the i-th on: i/n, for job arrays.")
RAY = flags.DEFINE_string("ray", None, "Do the runs as tasks of a Ray cluster: local starts one, auto joins one.")
PER_RUN = flags.DEFINE_string("per_run", "CPU=1", "With --ray: what each run reserves.")
flags.mark_flags_as_required(["study", "workdir"])


def main() -> None:
    """Runs the study, or its shard, and tells where the results are."""
    from sparse_lm.study.page import write_page
    from sparse_lm.study.plan import make_plan
    from sparse_lm.study.processes import check_side_by_side, run_processes
    from sparse_lm.study.ray_engine import Cluster, run_on_ray
    from sparse_lm.study.results import gather, power_sentence, write_results
    from sparse_lm.study.runner import Shard, keep_programs, listing, run_study, study_dir
    from sparse_lm.study.study import load_study

    plan = make_plan(load_study(Path(str(STUDY.value))), SCALE.value, SEEDS.value)
    directory, shard = study_dir(plan, Path(str(WORKDIR.value))), Shard.parse(SHARD.value)
    if LIST.value:
        print("\n".join(listing(plan, directory, shard)))
        return
    if RAY.value or PARALLEL.value > 1:
        check_side_by_side(plan, *(("ray", RAY.value) if RAY.value else ("parallel", PARALLEL.value)))
    options = [f"--study={STUDY.value}", f"--workdir={WORKDIR.value}", f"--scale={SCALE.value}"]
    options += [f"--seeds={SEEDS.value}"] if SEEDS.value else []
    command = f"python experiments/ablate.py {shlex.join(options)}"
    keep_programs(directory)

    def write():
        results = gather(plan, directory, command)
        write_results(results, directory)
        return results, write_page(results, directory)

    if RAY.value:
        cluster = Cluster.parse(RAY.value, PER_RUN.value)
        ran = run_on_ray(plan, directory, sys.stdout, cluster, (shard, RETRY.value), after=write)
        status = 1 if ran.failed else 0
    elif PARALLEL.value > 1:
        more = [f"--devices={flags.FLAGS.devices}"] if flags.FLAGS.devices else []
        more += ["--retry"] if RETRY.value else []
        status = run_processes([sys.executable, __file__, *options, *more], shard, PARALLEL.value, os.environ).status
    else:
        ran = run_study(plan, directory, sys.stdout, shard, RETRY.value, after=write)
        status = 1 if ran.failed else 0
    results, path = write()
    for judged in results.judged:
        print(f"{judged.verdict:13} {judged.claim.name}")
    print(f"{power_sentence(results)}\nresults in {directory}: {path.name}, results.json, table.md, plots/")
    sys.exit(status)


if __name__ == "__main__":
    run(main)
