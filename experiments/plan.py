"""Tells what a run will need, without training: parameters, bytes per device, collectives and FLOPs of its step.

python experiments/plan.py --config=configs/quickstart.py
    [--config.mesh.expert=4 --devices=8 --config.model.moe.dispatcher=all_to_all]  [--nocompile]  [--json=FILE]

--devices=N plans for N virtual CPU devices. --nocompile leaves out what only the compiled step can tell. No data are
read.
"""

import json
from pathlib import Path

from absl import flags
from common import define_config, experiment, run

CONFIG = define_config()
COMPILE = flags.DEFINE_bool("compile", True, "Compile the train step: temporaries, collectives, XLA's FLOPs.")
JSON = flags.DEFINE_string("json", None, "Write every number to this file.")
flags.mark_flag_as_required("config")


def main() -> None:
    """Prints the plan, and writes it where asked to."""
    import jax

    from sparse_lm.config import ConfigError, to_dict
    from sparse_lm.planning.plan import describe, make_plan, resolve
    from sparse_lm.sharding import make_mesh

    config = resolve(experiment(CONFIG.value))
    plan = make_plan(config, make_mesh(config.mesh_sizes(jax.device_count())), COMPILE.value)
    print(describe(plan, config))
    if JSON.value:
        try:
            Path(JSON.value).write_text(json.dumps({"config": to_dict(config), **plan.to_json()}, indent=2) + "\n")
        except OSError as error:
            raise ConfigError("json", JSON.value, f"cannot be written ({error}); choose another file") from error


if __name__ == "__main__":
    run(main)
