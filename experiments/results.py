"""All studies on one page: runs what is not finished, then writes docs/results.md and docs/results/<study>/.

python experiments/results.py [--workdir=runs/studies] [--studies=experts,capacity] [--parallel=2] [--out=docs]
    [--scale=toy|small|paper] [--nothing_new]

`make results` calls it. --studies runs some of them, in that order; the page has all, the others as they were before.
--nothing_new runs nothing and only collects what the folder holds. It can be stopped and goes on as
experiments/ablate.py does, which it calls for each study.
"""

import os
import sys
from pathlib import Path

from absl import flags
from common import run

ROOT = Path(__file__).resolve().parent.parent
WORKDIR = flags.DEFINE_string("workdir", "runs/studies", "The studies are kept here.")
OUT = flags.DEFINE_string("out", "docs", "Write results.md and results/ here.")
STUDIES = flags.DEFINE_list("studies", None, "Run these files of configs/ablations/, in this order; left out: all.")
SCALE = flags.DEFINE_string("scale", "toy", "toy (minutes a study on two cores), small (a GPU) or paper (a pod).")
PARALLEL = flags.DEFINE_integer("parallel", 1, "Processes side by side, but for studies of equal time.", 1)
NOTHING_NEW = flags.DEFINE_bool("nothing_new", False, "Run nothing, collect what there is.")


def main() -> None:
    """Runs what is missing, study by study, and tells where the page is."""
    from sparse_lm.config import ConfigError, closest
    from sparse_lm.study.collect import outstanding, read_entries, write_collection
    from sparse_lm.study.plan import make_plan
    from sparse_lm.study.processes import run_processes
    from sparse_lm.study.runner import Shard, study_dir
    from sparse_lm.study.study import load_study

    files = {path.stem: os.path.relpath(path) for path in sorted((ROOT / "configs" / "ablations").glob("*.py"))}
    for name in STUDIES.value or ():
        if name not in files:
            raise ConfigError("studies", name, closest(name, files))
    workdir, status = Path(str(WORKDIR.value)), 0
    for name in () if NOTHING_NEW.value else STUDIES.value or files:
        plan = make_plan(load_study(Path(files[name])), SCALE.value)
        directory = study_dir(plan, workdir)
        print(f"{name}: {outstanding(plan, directory)} of {len(plan.runs)} runs to do", flush=True)
        command = [sys.executable, str(ROOT / "experiments" / "ablate.py"), f"--study={files[name]}"]
        command += [f"--workdir={workdir}", f"--scale={SCALE.value}"]
        count = 1 if plan.study.budget == "time" else max(1, min(PARALLEL.value, outstanding(plan, directory)))
        ended = run_processes(command, Shard(), count, os.environ)
        status = max(status, ended.status)
        if ended.stopped:
            print("stopped; the same command goes on from there")
            break
    out = Path(str(OUT.value))
    page = write_collection(read_entries(workdir, list(files), out), out)
    print(f"results in {page}")
    sys.exit(status)


if __name__ == "__main__":
    run(main)
