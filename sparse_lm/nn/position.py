"""Positions: rotary, learned and sinusoidal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sparse_lm.nn.init import fan_in_normal
from sparse_lm.nn.rope_scaling import RopeScaling
from sparse_lm.sharding import Rules


def rotary(
    x_BLHI: Float[Array, "B L H I"], positions_BL: Int[Array, "B L"], base: float, scaling: RopeScaling | None = None
) -> Float[Array, "B L H I"]:
    """Rotates pairs (i, i + I/2) of each head by position * base^(-2i/I), in float32.

    scaling: of the frequencies, for rows longer than in training; None is none.
    Source: Su et al. 2021 (RoFormer), equation 34, with halves instead of neighbours as pairs (GPT-NeoX, LLaMA).
    """
    half = x_BLHI.shape[-1] // 2
    if scaling is None:
        frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    else:
        frequency = jnp.asarray(scaling.stretched(base ** (-np.arange(half) / half), base), jnp.float32)
    angle = positions_BL[:, :, None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    if scaling is not None:
        sin, cos = sin * scaling.amplitude, cos * scaling.amplitude
    first, second = jnp.split(x_BLHI.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BLHI.dtype)


def sinusoidal(positions_BL: Int[Array, "B L"], d_model: int) -> Float[Array, "B L D"]:
    """Fixed vectors: sines in the first half of the width, cosines in the second (Vaswani et al. 2017, section 3.5)."""
    half = d_model // 2
    frequency = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BL[:, :, None].astype(jnp.float32) * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class LearnedPositions(nnx.Module):
    """One trained vector per position, with standard deviation 0.02."""

    def __init__(self, key: jax.Array, length: int, d_model: int, rules: Rules):
        self.rules = rules
        self.table_LD = nnx.Param(fan_in_normal(key, (length, d_model), fan_in=1, scale=0.02**2))

    def __call__(self, positions_BL: Int[Array, "B L"], dtype) -> Float[Array, "B L D"]:
        """Vectors of the positions, each below the table's length."""
        return self.rules.take_rows(self.rules.whole(self.table_LD[...], dtype), positions_BL, "BLD")
