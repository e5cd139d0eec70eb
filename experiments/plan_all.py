"""Tells of every published model in configs/paper what it counts, beside what is published, and what its slice needs.

python experiments/plan_all.py [--folder=configs/paper] [--compile=mixtral_8x7b,switch_c_2048]
A Markdown table, as in docs/plans.md, of bytes that are estimated but for the models that --compile names.
"""

import os
from pathlib import Path

from absl import flags
from common import WITHOUT_A_TPU, run

FOLDER = flags.DEFINE_string(
    "folder", str(Path(__file__).resolve().parents[1] / "configs" / "paper"), "Folder of configurations with PUBLISHED."
)
COMPILE = flags.DEFINE_list("compile", [], "Models whose steps are compiled, as they are named in the table.")


def main() -> None:
    """Prints the table."""
    import jax

    from sparse_lm.planning.catalogue import catalogue, to_markdown

    jax.config.update("jax_platforms", "cpu")  # described devices need no real ones
    print(to_markdown(catalogue(Path(FOLDER.value)), COMPILE.value), end="")


if __name__ == "__main__":
    for name, value in WITHOUT_A_TPU.items():
        os.environ.setdefault(name, value)
    run(main)
