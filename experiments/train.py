"""Trains a model, or goes on with a run that was interrupted.

python experiments/train.py --config=configs/quickstart.py --workdir=runs/a
    [--config.model.moe.num_experts=16 --config.mesh.expert=4 ...]  [--devices=8]

--devices=N runs on N virtual CPU devices; without it, on what the machine has.

On several hosts the same command runs on each, with --coordinator=HOST:PORT --processes=N --process=I unless SLURM or
the TPU runtime tell; --supervise[=3] restarts it after a crash. See docs/hosts.md.
"""

import sys
from pathlib import Path

import hosts
from absl import flags
from common import define_config, experiment, run

CONFIG = define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; a run that is there is resumed.")
PROMPT = flags.DEFINE_string("sample_prompt", "def ", "What the printed continuation begins with.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    """Trains, then prints a sample and what to do next."""
    from sparse_lm.train.hosts import is_first
    from sparse_lm.train.session import train

    workdir = Path(str(WORKDIR.value))
    status = hosts.supervised(workdir)
    if status is not None:
        sys.exit(status)
    hosts.join()
    session = train(experiment(CONFIG.value), workdir, sys.stdout)
    tokens = session.experiment.train.sample_tokens
    if session.outcome.stopped:
        return
    text = session.experiment.data.source in ("stdlib", "text")
    if tokens and text:
        print_sample(session, tokens)
    if not is_first():
        return
    print(f"next:\n  open {session.report} in a browser")
    if text:
        print(f"  python experiments/generate.py --workdir={workdir} --prompt='import '")
    if session.experiment.model.moe:
        print(f"  python experiments/train.py --config=configs/quickstart.py:dense --workdir={workdir}_dense")


def print_sample(session, tokens: int) -> None:
    """Prints a continuation of the prompt by the trained model."""
    from sparse_lm.generate.complete import complete
    from sparse_lm.train.hosts import fetch, is_first

    model = fetch(session.outcome.model)  # off the mesh: one sequence cannot be shared
    if not is_first():
        return
    tokenizer = session.dataset.tokenizer
    if model.config.position == "learned":
        tokens = min(tokens, model.config.max_length - len(tokenizer.encode(PROMPT.value)))
    print(f"\nsample of up to {tokens} tokens (temperature 0.8, top_p 0.95):")
    for piece in complete(model, tokenizer, PROMPT.value, tokens, seed=session.experiment.seed):
        print(piece, end="", flush=True)
    print("\n")


if __name__ == "__main__":
    run(main)
