"""A plan as a file: every number, what it was made for, and when and with what it was made."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_lm.config import ConfigError, to_dict
from sparse_lm.experiment import Experiment
from sparse_lm.planning.plan import Plan
from sparse_lm.telemetry.machine import cpu_cores, cpu_model, version
from sparse_lm.telemetry.sinks import replace_file

MAKERS = ("sparse_lm", "jax", "flax", "libtpu")  # packages whose versions a plan depends on


def describe(plan: Plan, experiment: Experiment, topology: str | None) -> dict[str, Any]:
    """What `write` writes. topology: as it was asked for, None for the devices that are here."""
    made = {
        "day": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in MAKERS},
        "host": {"cpu": cpu_model(), "cores": cpu_cores()},
    }
    return {"made": made, "topology": topology, "config": to_dict(experiment), **plan.to_json()}


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Raises `ConfigError` where the file cannot be written."""
    try:
        replace_file(path, (json.dumps(content, indent=2) + "\n").encode())
    except OSError as error:
        raise ConfigError("json", str(path), f"cannot be written ({error}); choose another file") from error


def read(path: Path, experiment: Experiment, topology: str) -> dict[str, Any] | None:
    """The compiled plan in a file, also one that the compiler gave up on.

    None where there is none, or one of another experiment or slice, or made by other versions.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    wanted = {"topology": topology, "config": json.loads(json.dumps(to_dict(experiment)))}
    same = all(found.get(name) == value for name, value in wanted.items()) and isinstance(found["compiled"], dict)
    return found if same and found["made"]["versions"] == {name: version(name) for name in MAKERS} else None
