"""Measures on this machine, both sides of every comparison in turn.

python experiments/bench.py --list
python experiments/bench.py moe_layer --json=FILE  [--tokens=4096 --dtype=bfloat16 --activation=gelu --repeats=7]
python experiments/bench.py train_step             [--config=configs/quickstart.py --config.model.moe.num_experts=64]

Without a name all of them run with --quick: small sizes and few repeats, to see that they run. The name comes first.
"""

import json
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
JSON = flags.DEFINE_string("json", None, "Write every number to this file; a list of benchmarks when no name is given.")
QUICK = flags.DEFINE_bool("quick", None, "Small sizes and few repeats; left out: when no name is given.")
REPEATS = flags.DEFINE_integer("repeats", None, "Pairs of measurements; left out: the benchmark's own number.", 1)
TOKENS = flags.DEFINE_integer("tokens", None, "moe_layer: tokens in one call; left out: 4096, or 512 when quick.", 1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "moe_layer: of the computation.")
ACTIVATION = flags.DEFINE_enum("activation", "relu", ["relu", "gelu"], "moe_layer: of the hidden layer.")


def main() -> None:
    """Runs the named benchmark, or all of them."""
    from sparse_lm.bench.harness import Options
    from sparse_lm.bench.run import BENCHMARKS, run_benchmark, summary
    from sparse_lm.config import ConfigError

    if LIST.value:
        print(summary())
        return
    quick = NAME is None if QUICK.value is None else QUICK.value
    config = experiment(CONFIG.value)
    options = Options(config, quick, REPEATS.value, TOKENS.value, DTYPE.value, ACTIVATION.value)
    reports = []
    for name in BENCHMARKS if NAME is None else [NAME]:
        reports.append(run_benchmark(name, options))
        print(reports[-1].text() + "\n", flush=True)
    if JSON.value:
        values = [report.to_json() for report in reports]
        try:
            Path(JSON.value).write_text(json.dumps(values if NAME is None else values[0], indent=2) + "\n")
        except OSError as error:
            raise ConfigError("json", JSON.value, f"cannot be written ({error}); choose another file") from error


if __name__ == "__main__":
    run(main)
