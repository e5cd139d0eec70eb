"""Continues a prompt with a trained model; the text is written to stdout while it comes, the prompt first.

python experiments/generate.py --workdir=runs/a --prompt="def " --max_new_tokens=200
    [--temperature=0.8 --top_k=40 --top_p=0.95 --seed=1]  [--best | --step=1000]

A model of bytes stops at the end of its document; its empty prompt starts from the token that ends one. Synthetic
languages read the ids of their data: --prompt="3 0 17" (grammar), --prompt="| a3 b17" (facts).
"""

from absl import flags
from common import run

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
PROMPT = flags.DEFINE_string("prompt", "", "What is continued.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 200, "Stop after this many tokens.")
TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.8, "Logits are divided by it; 0 always takes the most probable token."
)
TOP_K = flags.DEFINE_integer("top_k", None, "Draw from the k most probable tokens; left out: from all.")
TOP_P = flags.DEFINE_float("top_p", None, "Draw from the fewest tokens of this probability; left out: from all.")
SEED = flags.DEFINE_integer("seed", 0, "Of the draws: the same seed gives the same text.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to take; left out: the newest.")
BEST = flags.DEFINE_bool("best", False, "Take the checkpoint with the lowest validation loss.")
flags.mark_flag_as_required("workdir")


def main() -> None:
    """Loads the newest, the best or the given checkpoint and writes its continuation of the prompt."""
    import jax

    from sparse_lm.generate.complete import complete
    from sparse_lm.generate.sample import Sampling
    from sparse_lm.mesh import make_mesh
    from sparse_lm.train.restore import load_model

    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        loaded = load_model(str(WORKDIR.value), STEP.value, BEST.value)
        length, seed = MAX_NEW_TOKENS.value, SEED.value
        for piece in complete(loaded.model, loaded.tokenizer, PROMPT.value, length, sampling, seed):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    run(main)
