"""The tiny run as a file for --config, long enough to be interrupted; needs this folder on PYTHONPATH."""

from typing import Any

import tiny
from ml_collections import ConfigDict

from sparse_lm.config import to_config_dict


def get_config(variant: str = "sparse") -> ConfigDict:
    changes: dict[str, Any] = {"train__steps": 60, "train__eval_every": 20, "checkpoint__every": 7}
    if variant == "dense":
        changes["model__moe"] = None
    return to_config_dict(tiny.experiment(**changes))
