"""The dense feed-forward layer and the activations that experts share with it."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparse_lm.nn.dropout import dropout
from sparse_lm.nn.init import fan_in_normal
from sparse_lm.nn.remat import named
from sparse_lm.sharding import Rules

Activation = Literal["relu", "gelu", "geglu", "swiglu", "clamped_swiglu"]
ACTIVATIONS = get_args(Activation)
GATED = ("geglu", "swiglu", "clamped_swiglu")
CLAMP, SHARPNESS = 7.0, 1.702  # of clamped_swiglu, as in gpt-oss
_FUNCTION = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "geglu": jax.nn.gelu, "swiglu": jax.nn.silu}


def activate(kind: str, up: jax.Array, gate: jax.Array | None) -> jax.Array:
    """The hidden values: function(up), or function(gate) * up for the gated kinds (Shazeer 2020).

    `clamped_swiglu` is gpt-oss's (arXiv 2508.10925): gate * sigmoid(1.702 gate) * (up + 1), with the gate cut off above
    7 and up beyond +-7.
    """
    if kind == "clamped_swiglu":
        assert gate is not None
        gate = jnp.minimum(gate, CLAMP)
        return gate * jax.nn.sigmoid(SHARPNESS * gate) * (jnp.clip(up, -CLAMP, CLAMP) + 1)
    return _FUNCTION[kind](up) if gate is None else _FUNCTION[kind](gate) * up


class Mlp(nnx.Module):
    """D -> F -> D without biases."""

    def __init__(self, key: jax.Array, d_model: int, d_ff: int, kind: str, rules: Rules, dropout_rate: float = 0.0):
        up, gate, down = jax.random.split(key, 3)
        self.kind, self.rules, self.dropout_rate = kind, rules, dropout_rate
        self.up_DF = nnx.Param(fan_in_normal(up, (d_model, d_ff), d_model))
        self.gate_DF = nnx.Param(fan_in_normal(gate, (d_model, d_ff), d_model)) if kind in GATED else None
        self.down_FD = nnx.Param(fan_in_normal(down, (d_ff, d_model), d_ff))

    def __call__(self, x_BLD: Float[Array, "B L D"], key: jax.Array | None = None) -> Float[Array, "B L D"]:
        """The same shape and dtype. key: None is evaluation."""
        rules, dtype = self.rules, x_BLD.dtype
        up_BLF = rules.einsum("BLD,DF->BLF", x_BLD, rules.gather(self.up_DF[...], "DF", dtype))
        gate_BLF = None
        if self.gate_DF is not None:
            gate_BLF = rules.einsum("BLD,DF->BLF", x_BLD, rules.gather(self.gate_DF[...], "DF", dtype))
        up_BLF, gate_BLF = named((up_BLF, gate_BLF), "mlp_hidden")
        hidden_BLF = dropout(activate(self.kind, up_BLF, gate_BLF), self.dropout_rate, key)
        return rules.einsum("BLF,FD->BLD", hidden_BLF, rules.gather(self.down_FD[...], "FD", dtype))
