"""Trains a model, or goes on with a run that was interrupted.

python experiments/train.py --config=configs/quickstart.py --workdir=runs/a
    [--config.model.moe.num_experts=16 --config.mesh.expert=4 ...]  [--devices=8]

--devices=N runs on N virtual CPU devices; without it, on what the machine has.
"""

import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment to run, a file of configs/.", lock_config=False, accept_new_attributes=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; a run that is there is resumed.")
DEVICES = flags.DEFINE_integer("devices", None, "Number of virtual CPU devices; None uses the machine's own.", 1)
SAMPLE_PROMPT = flags.DEFINE_string("sample_prompt", "def ", "What the continuation in the end begins with.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    """Parses, trains, prints a sample and what to do next."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    import jax

    if DEVICES.value:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", DEVICES.value)
    from sparse_lm.config import ConfigError, from_dict
    from sparse_lm.data.documents import DataError
    from sparse_lm.experiment import Experiment
    from sparse_lm.generate.sample import sample_text
    from sparse_lm.train.checkpoint import CheckpointError
    from sparse_lm.train.loop import TrainingError
    from sparse_lm.train.session import train

    workdir = Path(WORKDIR.value)
    try:
        session = train(from_dict(Experiment, CONFIG.value), workdir, sys.stdout)
    except (ConfigError, DataError, CheckpointError, TrainingError) as error:
        sys.exit(f"error: {error}")
    tokens = session.experiment.train.sample_tokens
    if session.outcome.stopped or not tokens:
        return
    text = sample_text(session.outcome.model, session.dataset.tokenizer, SAMPLE_PROMPT.value, tokens, session.experiment.seed)
    print(f"\nsample ({tokens} tokens, temperature 0.8):\n{text}\n")
    print("next:")
    print(f"  python experiments/generate.py --workdir={workdir} --prompt='import '")
    print(f"  python experiments/train.py --config=configs/quickstart.py:dense --workdir={workdir}_dense")


if __name__ == "__main__":
    app.run(main)
