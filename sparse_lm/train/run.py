"""The directory of a run: what was asked for, with what, and whether a second start means the same run."""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from sparse_lm.config import ConfigError, dotted, from_dict, to_dict
from sparse_lm.data.loader import Dataset
from sparse_lm.experiment import Experiment
from sparse_lm.telemetry.machine import cpu_cores, cpu_model, version
from sparse_lm.telemetry.rundata import CONFIG_NAME
from sparse_lm.telemetry.sinks import replace_file

CHECKPOINTS_NAME = "checkpoints"
PACKAGES = ("sparse_lm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# What may change when a run is resumed: it alters neither the model nor its data, only how and how long they are run.
# The text may lie elsewhere: the fingerprint tells whether it is the same.
RESUMABLE = (
    "data.path",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.max_nonfinite",
    "train.sample_tokens",
    "train.accumulate",
    "train.pipeline_microbatches",
    "checkpoint",
    "mesh",
    "sharding",
    "model.remat",
    "model.loss_chunk",
    "model.scan_layers",
    "model.moe.dispatcher",
    "model.moe.exchange_chunks",
    "model.moe.hot_copies",
    "model.moe.exchange_room",
)


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What config.json holds: see `describe_run`."""

    experiment: Experiment
    fingerprint: str


def describe_run(experiment: Experiment, dataset: Dataset, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json: resolved configuration, versions, commit, devices, host, data, parameters."""
    device = jax.devices()[0]
    return {
        "config": to_dict(experiment),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "git": _commit(),
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "host": {"cpu": cpu_model(), "cores": cpu_cores()},
        "data": {
            "fingerprint": dataset.fingerprint,
            "domains": list(dataset.domains),
            "report": dataset.report.lines(),
            "entropy": dataset.entropy,
        },
        "parameters": dict(parameters),
    }


def write_info(workdir: Path, info: Mapping[str, Any]) -> None:
    """Writes config.json; a reader meets the old one or the new one. Raises `ConfigError` where that is impossible."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        replace_file(workdir / CONFIG_NAME, (json.dumps(info, indent=2) + "\n").encode())
    except OSError as error:
        raise ConfigError("workdir", str(workdir), f"cannot be written ({error}); choose another directory") from error


def read_info(workdir: Path) -> RunInfo | None:
    """The run that a directory holds, or None. Raises `ConfigError` when its config.json cannot be understood."""
    path = workdir / CONFIG_NAME
    if not path.exists():
        return None
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        return RunInfo(from_dict(Experiment, info["config"]), info["data"]["fingerprint"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "workdir", str(workdir), f"{path} is not a configuration that this version reads ({error}); use another one"
        ) from error


def check_resumable(stored: RunInfo, experiment: Experiment, fingerprint: str) -> None:
    """Raises `ConfigError` when the run in the directory is another one, naming the key and both values."""
    before, now = dotted(to_dict(stored.experiment)), dotted(to_dict(experiment))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not any(key == r or key.startswith(r + ".") for r in RESUMABLE):
            raise ConfigError(
                key,
                now.get(key),
                f"the run in this workdir has {before.get(key)!r}; set it back to resume, or choose another --workdir",
            )
    if stored.fingerprint != fingerprint:
        raise ConfigError(
            "data.source",
            experiment.data.source,
            f"the data have changed since the run in this workdir began (fingerprint {stored.fingerprint[:12]}, now "
            f"{fingerprint[:12]}; for stdlib: another Python or other packages); choose another --workdir",
        )


def _commit() -> str | None:
    """The commit of the checkout that the package runs from, with `-dirty` when files differ; None without one."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
