"""Configuration of the optimizer."""

from __future__ import annotations

import dataclasses
from typing import Literal

from sparse_lm.config import Config, ConfigError, option


@dataclasses.dataclass(frozen=True)
class OptimConfig(Config):
    """Optimizer, schedule and clipping.

    name: `adamw`, `adafactor` (the Switch recipe: factored second moments, relative to the parameter scale), `lion`, or
        `sgd` (with momentum beta1).
    learning_rate: the peak.
    schedule: after `warmup_steps` of linear warm-up: `cosine` or `linear` down to `final_fraction` of the peak at the
        last step, `rsqrt` (peak * sqrt(warmup / step)), or `constant`.
    state_dtype: of the first moment (adamw, lion, sgd); arithmetic and second moments are float32 always.
    weight_decay: decoupled; norms, biases and embeddings are exempt.
    clip: bound on the global gradient norm; None is off.
    """

    name: Literal["adamw", "adafactor", "lion", "sgd"] = "adamw"
    learning_rate: float = option(2e-3, gt=0)
    schedule: Literal["cosine", "linear", "rsqrt", "constant"] = "cosine"
    warmup_steps: int = option(50, ge=0)
    final_fraction: float = option(0.1, ge=0, le=1)
    weight_decay: float = option(0.1, ge=0)
    beta1: float = option(0.9, ge=0, lt=1)
    beta2: float = option(0.99, ge=0, lt=1)
    eps: float = option(1e-8, gt=0)
    clip: float | None = option(1.0, gt=0)
    state_dtype: Literal["float32", "bfloat16"] = "float32"

    def check(self) -> None:
        """Raises `ConfigError` where there is no first moment to be stored narrowly."""
        if self.name == "adafactor" and self.state_dtype != "float32":
            raise ConfigError("state_dtype", self.state_dtype, "adafactor has no first moment; use float32")
