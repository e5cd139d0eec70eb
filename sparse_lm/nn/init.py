"""Initial values of weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# A unit normal cut at two standard deviations has this standard deviation; dividing by it restores the one asked for.
TRUNCATED_STD = 0.87962566103423978


def fan_in_normal(key: jax.Array, shape: tuple[int, ...], fan_in: int, scale: float = 1.0) -> jax.Array:
    """A float32 normal cut at two standard deviations, with variance scale / fan_in.

    Source: Fedus et al. 2021 (Switch Transformer), section 2.4, with s = `scale`; there s = 0.1 keeps sparse models
    stable. The cut is corrected for, so that the standard deviation is exact.
    """
    std = (scale / fan_in) ** 0.5 / TRUNCATED_STD
    return std * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
