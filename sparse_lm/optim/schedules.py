"""Learning rate schedules: linear warm-up, then one of four ways down."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from sparse_lm.optim.config import OptimConfig


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates made so far (0 for the first update).

    With w = max(warmup_steps, 1), the warm-up is peak * (count + 1) / w: the first update is never wasted on a rate of
    0, and the peak is reached exactly once, by update number w - 1. From there `cosine` and `linear` fall to
    `final_fraction` * peak at the last update, number steps - 1, and stay there beyond it; `rsqrt` is
    peak * sqrt(w / (count + 1)), the schedule of T5 (Raffel et al. 2020, section 3.1.2) continuous at the peak.

    A training that ends before the warm-up does never reaches the peak.
    """
    peak, warmup = config.learning_rate, max(config.warmup_steps, 1)
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1)
    return optax.join_schedules([rise, _fall(config, max(0, steps - warmup), warmup)], [warmup - 1])


def _fall(config: OptimConfig, updates: int, warmup: int) -> optax.Schedule:
    """From the peak at count 0 to the final rate at count `updates`."""
    peak, final = config.learning_rate, config.final_fraction
    if config.schedule == "rsqrt":
        return lambda count: peak * jnp.sqrt(warmup / (count + warmup))
    if config.schedule == "constant" or updates == 0:
        return optax.constant_schedule(peak)
    if config.schedule == "linear":
        return optax.linear_schedule(peak, peak * final, updates)
    return optax.cosine_decay_schedule(peak, updates, final)
