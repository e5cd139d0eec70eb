"""Fits a scaling law to measured runs, or evaluates a published one; writes its numbers, plots and best sizes.

python experiments/scaling.py --law=joint --workdir=runs/scaling
    [--points=FILE.csv|STUDY/results.json|DIRECTORY_OF_RUNS]  [--budgets=1e20,1e21] [--experts=8 --granularity=8]
    [--resamples=200 --seed=0 --delta=0.001]
python experiments/scaling.py --list
python experiments/scaling.py --ladder=configs/ladder.py

Without --points it is the law of the paper. --ladder lists runs of equal FLOPs, each as flags for experiments/train.py.
"""

import shlex
import sys
from pathlib import Path

from absl import flags
from common import run

LAW = flags.DEFINE_string("law", None, "chinchilla, unified, granularity, joint or sparsity; see --list.")
POINTS = flags.DEFINE_string("points", None, "A CSV, a study's results.json, or a directory of runs, to fit to.")
WORKDIR = flags.DEFINE_string("workdir", None, "Write fit.json, report.html and plots/ here; left out: only print.")
BUDGETS = flags.DEFINE_list("budgets", [], "Training FLOPs to find the best sizes for; left out: the points' own.")
FIXED = {
    name: flags.DEFINE_float(name, None, f"The law's {name} in curves of equal FLOPs; left out: the points' median.")
    for name in ("experts", "granularity", "sparsity")
}
RESAMPLES = flags.DEFINE_integer("resamples", 200, "Of the bootstrap over points; 0: no intervals.", 0)
SEED = flags.DEFINE_integer("seed", 0, "Of the starts and the resamples.", 0)
DELTA = flags.DEFINE_float("delta", 1e-3, "Residuals of log loss beyond it count linearly (Huber).")
LADDER = flags.DEFINE_string("ladder", None, "List the runs of this ladder, a file that defines LADDER.")
LIST = flags.DEFINE_bool("list", False, "List the published laws.")


def main() -> None:
    """Lists, or fits and reports."""
    from sparse_lm.config import ConfigError
    from sparse_lm.scaling.fit import FitOptions, fit
    from sparse_lm.scaling.ladder import describe, load_ladder, plan_ladder
    from sparse_lm.scaling.points import read
    from sparse_lm.scaling.published import PUBLISHED, law_type, published
    from sparse_lm.scaling.report import make_report, summary, write_report

    if LIST.value:
        for name, law in PUBLISHED.items():
            print(f"{name:13} {', '.join(law.columns):40} {law.source}")
        return
    if LADDER.value:
        print(describe(plan_ladder(load_ladder(Path(str(LADDER.value))))))
        return
    if LAW.value is None:
        raise ConfigError("law", None, f"is needed; known: {', '.join(PUBLISHED)}")
    try:
        budgets = [float(value) for value in BUDGETS.value]
    except ValueError as error:
        raise ConfigError("budgets", BUDGETS.value, "expected numbers, as in --budgets=1e20,1e21") from error
    fixed = {name: flag.value for name, flag in FIXED.items() if flag.value is not None}
    law, found = published(LAW.value) if POINTS.value is None else None, None
    if law is None:
        points = read(Path(str(POINTS.value)))
        options = FitOptions(DELTA.value, resamples=RESAMPLES.value, seed=SEED.value)
        found = (fit(law_type(LAW.value), points, options), points)
        law = found[0].law
    command = f"python experiments/scaling.py {shlex.join(sys.argv[1:])}"
    report = make_report(law, found, budgets, fixed, command)
    print(summary(report))
    if WORKDIR.value:
        print(f"report in {write_report(report, Path(str(WORKDIR.value)))}")


if __name__ == "__main__":
    run(main)
