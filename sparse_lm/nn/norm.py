"""Normalisation layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparse_lm.sharding import Rules


def unit_mean_square(x: Float[Array, "..."], eps: float, axes: int | tuple[int, ...] = -1) -> Float[Array, "..."]:
    """`x` over the root of its mean square along `axes`: what an RMSNorm scales."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=axes, keepdims=True) + eps)


class Norm(nnx.Module):
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016) over the model width, computed in float32.

    kind: `rmsnorm`, `layernorm`, or `layernorm_no_bias`, which is centred and adds nothing (DBRX).
    """

    def __init__(self, kind: str, d_model: int, rules: Rules, eps: float = 1e-6):
        self.kind, self.rules, self.eps = kind, rules, eps
        self.scale_D = nnx.Param(jnp.ones((d_model,), jnp.float32))
        self.bias_D = nnx.Param(jnp.zeros((d_model,), jnp.float32)) if kind == "layernorm" else None

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """The same shape and dtype."""
        x = x_BLD.astype(jnp.float32)
        if self.kind != "rmsnorm":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = unit_mean_square(x, self.eps) * self.rules.whole(self.scale_D[...])
        if self.bias_D is not None:
            x = x + self.rules.whole(self.bias_D[...])
        return x.astype(x_BLD.dtype)
