"""Tells of every published model in configs/paper what it counts, beside what is published, and what its slice needs.

python experiments/plan_all.py [--folder=configs/paper]
A Markdown table, as in docs/plans.md. Nothing is compiled; experiments/plan.py compiles one of them for its slice.
"""

from pathlib import Path

from absl import flags
from common import run

FOLDER = flags.DEFINE_string(
    "folder", str(Path(__file__).resolve().parents[1] / "configs" / "paper"), "Folder of configurations with PUBLISHED."
)


def main() -> None:
    """Prints the table."""
    import jax

    from sparse_lm.planning.catalogue import catalogue, to_markdown

    jax.config.update("jax_platforms", "cpu")  # described devices need no real ones
    print(to_markdown(catalogue(Path(FOLDER.value))), end="")


if __name__ == "__main__":
    run(main)
