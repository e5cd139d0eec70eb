"""Configuration of the optimizer."""

from __future__ import annotations

import dataclasses
from typing import Literal

from sparse_lm.config import Config, option


@dataclasses.dataclass(frozen=True)
class OptimConfig(Config):
    """Optimizer, schedule and clipping.

    name: `adamw`, `adafactor` (the Switch recipe: factored second moments, relative to the parameter scale) or `lion`.
    learning_rate: the peak.
    schedule: after `warmup_steps` of linear warm-up: `cosine` or `linear` down to `final_fraction` of the peak at the
        last step, `rsqrt` (peak * sqrt(warmup / step)), or `constant`.
    weight_decay: decoupled; norms, biases and embeddings are exempt.
    clip: bound on the global gradient norm; None is off.
    """

    name: Literal["adamw", "adafactor", "lion"] = "adamw"
    learning_rate: float = option(2e-3, gt=0)
    schedule: Literal["cosine", "linear", "rsqrt", "constant"] = "cosine"
    warmup_steps: int = option(50, ge=0)
    final_fraction: float = option(0.1, ge=0, le=1)
    weight_decay: float = option(0.1, ge=0)
    beta1: float = option(0.9, ge=0, lt=1)
    beta2: float = option(0.99, ge=0, lt=1)
    eps: float = option(1e-8, gt=0)
    clip: float | None = option(1.0, gt=0)
