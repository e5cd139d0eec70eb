"""Looks inside a trained run: what its experts specialise in, when they came to it, and what happens without them.

python experiments/analyze.py --workdir=runs/quickstart
    [--batches=16 --effect_batches=4 --shuffles=20] [--renormalise]  [--best | --step=1000]
    [--languages=en=English,src=C]

Writes analysis.html and analysis.json into the directory of the run, which is otherwise only read; docs/analysis.md
tells what they hold. --effect_batches=0 leaves out what takes longest, removing and forcing each expert.
"""

import sys
from pathlib import Path

from absl import flags
from common import run

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
BATCHES = flags.DEFINE_integer("batches", 16, "Batches of held-out rows to look at.", 1)
EFFECT_BATCHES = flags.DEFINE_integer("effect_batches", 4, "Batches of them to remove and force experts on.", 0)
SHUFFLES = flags.DEFINE_integer("shuffles", 20, "Shuffles of the labels behind every baseline.", 1)
RENORMALISE = flags.DEFINE_bool("renormalise", False, "Without an expert, a token's other gates grow to the same sum.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to look into; left out: the newest.")
BEST = flags.DEFINE_bool("best", False, "Look into the checkpoint with the lowest validation loss.")
LANGUAGES = flags.DEFINE_string("languages", None, "Of domains: domain=language,...; a domain alone is a language.")
flags.mark_flag_as_required("workdir")


def main() -> None:
    """Analyses the run and tells where the page is."""
    import shlex

    from sparse_lm.analysis.languages import parse
    from sparse_lm.analysis.page import write_analysis
    from sparse_lm.analysis.run import Options, analyze
    from sparse_lm.config import ConfigError

    chosen = (RENORMALISE.value, SHUFFLES.value, STEP.value, BEST.value, parse(LANGUAGES.value))
    options = Options(BATCHES.value, EFFECT_BATCHES.value, *chosen)
    found = analyze(Path(str(WORKDIR.value)), options)
    command = f"python experiments/analyze.py {shlex.join(sys.argv[1:])}"
    try:
        path = write_analysis(found, command)
    except OSError as error:
        raise ConfigError("workdir", WORKDIR.value, f"cannot be written ({error}); copy the run elsewhere") from error
    for where, special in found.all_specialisation():
        for one in special:
            layer = max(range(len(one.information)), key=lambda n: one.information[n].excess)
            best = one.information[layer]
            chance = "within chance" if best.chance else f"{best.shuffled:.4f} by chance"
            print(f"{one.kind + where:22} {best.bits:.4f} of {best.entropy:.3f} bits in layer {layer + 1} ({chance})")
    print(f"results in {found.workdir}: {path.name}, analysis.json")


if __name__ == "__main__":
    run(main)
