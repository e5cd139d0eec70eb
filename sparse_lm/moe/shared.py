"""Experts that see every token, beside the routed ones, and how the two outputs are added."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparse_lm.nn.init import fan_in_normal
from sparse_lm.nn.mlp import Mlp
from sparse_lm.sharding import Rules

SharedGate = Literal["none", "sigmoid", "mix"]


class SharedExperts(nnx.Module):
    """One feed-forward layer as wide as all shared experts together, which is the same as their sum.

    gate: `none` adds the outputs (DeepSeekMoE, OpenMoE); `sigmoid` scales the shared one with sigmoid(w x) (Qwen2-MoE);
    `mix` weighs routed and shared with a softmax over two logits of x (residual MoE: DeepSpeed-MoE, 2201.05596).
    """

    def __init__(self, key: jax.Array, sizes: tuple[int, int], kind: str, rules: Rules, gate: SharedGate, rate: float):
        """sizes: (model width, hidden width). kind: the activation. rate: of dropout of the hidden values."""
        self.gate, self.rules = gate, rules
        self.mlp = Mlp(key, *sizes, kind, rules, rate)
        outputs = {"none": 0, "sigmoid": 1, "mix": 2}[gate]
        self.mix_DK = (
            nnx.Param(fan_in_normal(jax.random.fold_in(key, 1), (sizes[0], outputs), sizes[0])) if outputs else None
        )

    def __call__(
        self, x_BLD: Float[Array, "B L D"], routed_BLD: Float[Array, "B L D"], key: jax.Array | None
    ) -> Float[Array, "B L D"]:
        """The sum of the routed experts' output and the shared ones'. Gates are float32. key: None is evaluation."""
        shared_BLD = self.mlp(x_BLD, key)
        if self.mix_DK is None:
            return routed_BLD + shared_BLD
        weight_DK = self.rules.whole(self.mix_DK[...])
        logits_BLK = self.rules.einsum("BLD,DK->BLK", x_BLD.astype(jnp.float32), weight_DK)
        if self.gate == "sigmoid":
            return routed_BLD + (jax.nn.sigmoid(logits_BLK) * shared_BLD).astype(x_BLD.dtype)
        share_BLK = jax.nn.softmax(logits_BLK, axis=-1)
        return (share_BLK[..., :1] * routed_BLD + share_BLK[..., 1:] * shared_BLD).astype(x_BLD.dtype)
