"""Measures on this machine, both sides of every comparison in turn.

python experiments/bench.py --list
python experiments/bench.py moe_layer --json=FILE  [--tokens=4096 --dtype=bfloat16 --activation=gelu --repeats=7]
python experiments/bench.py train_step             [--config=configs/quickstart.py --config.model.moe.num_experts=64]
python experiments/bench.py train_step --against=hf --python=OTHER/VENV/bin/python  [--batch=2 --dtype=bfloat16]
python experiments/bench.py experts                [--tokens=4096 --dtype=bfloat16]

Without a name all of them run with --quick: small sizes and few repeats, to see that they run. The name comes first.
"""

import os
import sys
from pathlib import Path

from absl import flags
from common import define_config, experiment, run

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.py"
NAME = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else None
if not any(argument.lstrip("-").partition("=")[0] == "config" for argument in sys.argv):
    sys.argv.insert(1, f"--config={QUICKSTART}")

CONFIG = define_config()
LIST = flags.DEFINE_bool("list", False, "Only name the benchmarks.")
JSON = flags.DEFINE_string(
    "json", None, "Write every number to this file, with CSV and SVG beside it; all when nameless."
)
QUICK = flags.DEFINE_bool("quick", None, "Small sizes and few repeats; left out: when no name is given.")
REPEATS = flags.DEFINE_integer("repeats", None, "Pairs of measurements; left out: the benchmark's own number.", 1)
TOKENS = flags.DEFINE_integer("tokens", None, "moe_layer, experts: tokens in one call; left out: 4096.", 1)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of moe_layer, experts, and train_step --against."
)
ACTIVATION = flags.DEFINE_enum("activation", "relu", ["relu", "gelu"], "moe_layer, experts: of the hidden layer.")
AGAINST = flags.DEFINE_enum("against", None, ["hf"], "train_step: transformers' Mixtral; left out: the dense twin.")
PYTHON = flags.DEFINE_string("python", None, "train_step --against: of an environment with torch and transformers.")
BATCH = flags.DEFINE_integer("batch", None, "train_step --against: rows in a step; left out: 8, or 2 when quick.", 1)


def main() -> None:
    """Runs the named benchmark, or all of them."""
    from sparse_lm.bench.files import write
    from sparse_lm.bench.harness import Options
    from sparse_lm.bench.run import BENCHMARKS, run_benchmark, summary

    if LIST.value:
        print(summary())
        return
    if AGAINST.value:  # on a GPU jax would take three quarters of the memory, which the other side shares
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    quick = NAME is None if QUICK.value is None else QUICK.value
    config, other = experiment(CONFIG.value), (AGAINST.value, PYTHON.value, BATCH.value)
    options = Options(config, quick, REPEATS.value, TOKENS.value, DTYPE.value, ACTIVATION.value, *other)
    reports = []
    for name in BENCHMARKS if NAME is None else [NAME]:
        reports.append(run_benchmark(name, options))
        print(reports[-1].text() + "\n", flush=True)
    if JSON.value:
        write(reports, Path(JSON.value), together=NAME is None)


if __name__ == "__main__":
    run(main)
