"""Tells of every published model in configs/paper what it counts, beside what is published, and what its slice needs.

python experiments/plan_all.py [--out=runs/plans] [--only=mixtral_8x7b,qwen3:30b] [--parallel=2] [--nocompile]
Compiles each training step for its TPU slice by experiments/plan.py, minutes each, and keeps the plans and what was
printed in --out; the same command goes on where it was stopped. Then prints two Markdown tables, as in docs/plans.md.
Without the compiler, and with --nocompile, what is not in --out is estimated.
"""

import os
import subprocess
import sys
from pathlib import Path

from absl import flags
from common import WITHOUT_A_TPU, run

ROOT = Path(__file__).resolve().parents[1]
FOLDER = flags.DEFINE_string("folder", str(ROOT / "configs" / "paper"), "Folder of configurations with PUBLISHED.")
OUT = flags.DEFINE_string("out", "runs/plans", "Compiled plans are kept here, a file for each model.")
ONLY = flags.DEFINE_list("only", [], "These models, as they are named in the table; left out: all.")
PARALLEL = flags.DEFINE_integer("parallel", 1, "Compilations side by side, of up to 5 GB each.", 1)
COMPILE = flags.DEFINE_bool("compile", True, "Compile what --out has not; otherwise formulas estimate it.")


def main() -> None:
    """Compiles, and prints the tables."""
    import jax

    from sparse_lm.planning import compilations
    from sparse_lm.planning.catalogue import catalogue, chosen, to_markdown
    from sparse_lm.planning.chips import cannot_compile, parse_topology

    jax.config.update("jax_platforms", "cpu")  # described devices need no real ones
    entries, out = chosen(catalogue(Path(FOLDER.value)), ONLY.value), Path(OUT.value)
    missing = {why for entry in entries if (why := cannot_compile(parse_topology(entry.topology)))}
    failed = 0
    if COMPILE.value and missing:
        print(f"estimated, not compiled: {'; '.join(sorted(missing))}", file=sys.stderr)
    elif COMPILE.value:
        failed = compilations.compile_all(entries, out, plan, PARALLEL.value)
    print(to_markdown(entries, compilations.files(entries, out)), end="")
    sys.exit(1 if failed else 0)


def plan(entry, path: Path) -> int:
    """Has experiments/plan.py write the plan; what it prints goes to a file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stem, _, variant = entry.name.partition(":")
    config = f"{Path(FOLDER.value) / stem}.py" + (f":{variant}" if variant else "")
    options = [f"--config={config}", f"--topology={entry.topology}", f"--json={path}", "--noadvise", "--largest=12"]
    with path.with_suffix(".txt").open("w") as printed:
        command = [sys.executable, str(ROOT / "experiments" / "plan.py"), *options]
        return subprocess.run(command, stdout=printed, stderr=subprocess.STDOUT, check=False).returncode


if __name__ == "__main__":
    for name, value in WITHOUT_A_TPU.items():
        os.environ.setdefault(name, value)
    run(main)
