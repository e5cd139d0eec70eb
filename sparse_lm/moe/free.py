"""Experts that cost next to nothing, beside the feed-forward ones: zero, copy and constant experts (MoE++)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sparse_lm.moe.types import TokenChoice
from sparse_lm.nn.init import fan_in_normal
from sparse_lm.sharding import Rules


class FreeExperts(nnx.Module):
    """E(x) = 0, E(x) = x, and E(x) = a1 x + a2 v with (a1, a2) = softmax(x W), in this order after the
    feed-forward ones.

    Every device computes them where the token is, in float32; they take no slots, so that none of their assignments is
    dropped. Source: Jin et al. 2024 (2410.07348), section 3.1. Conventions that it leaves open: W has no bias and
    starts like any matrix; v starts at unit variance, the scale of a normalised input.
    """

    def __init__(self, key: jax.Array, d_model: int, first: int, numbers: tuple[int, int, int], rules: Rules):
        """first: the number of feed-forward experts. numbers: of zero, copy and constant experts."""
        mix, vector = jax.random.split(key)
        self.first, self.numbers, self.rules = first, numbers, rules
        constant = numbers[2]
        self.mix_EDK = nnx.Param(fan_in_normal(mix, (constant, d_model, 2), d_model)) if constant else None
        self.vector_ED = nnx.Param(fan_in_normal(vector, (constant, d_model), 1)) if constant else None

    def chosen(self, decision: TokenChoice) -> Bool[Array, "G S K"]:
        """True where the assignment is to one of these experts."""
        return decision.expert_GSK >= self.first

    def others(self, decision: TokenChoice) -> TokenChoice:
        """The assignments to feed-forward experts; nothing in the places of the rest."""
        free_GSK = self.chosen(decision)
        return dataclasses.replace(
            decision,
            expert_GSK=jnp.where(free_GSK, -1, decision.expert_GSK),
            gate_GSK=jnp.where(free_GSK, 0.0, decision.gate_GSK),
        )

    def __call__(self, x_GSD: Float[Array, "G S D"], decision: TokenChoice) -> Float[Array, "G S D"]:
        """Each token's gated sum over these experts, in float32."""
        zero, copy, _ = self.numbers
        x_GSD = x_GSD.astype(jnp.float32)
        one_hot_GSKE = jax.nn.one_hot(decision.expert_GSK - self.first, sum(self.numbers), dtype=jnp.float32)
        gate_GSE = jnp.sum(decision.gate_GSK[..., None] * one_hot_GSKE, axis=2)
        scale_GS = jnp.sum(gate_GSE[..., zero : zero + copy], axis=-1)
        if self.mix_EDK is None or self.vector_ED is None:
            return scale_GS[..., None] * x_GSD
        gate_GSE = gate_GSE[..., zero + copy :]
        logits_GSEK = self.rules.einsum("GSD,EDK->GSEK", x_GSD, self.rules.whole(self.mix_EDK[...]))
        added_GSE = gate_GSE
        if decision.gate_on == "input":  # E(g x): the gate scales what W sees, and does not scale v
            logits_GSEK = logits_GSEK * gate_GSE[..., None]
            added_GSE = jnp.sum(one_hot_GSKE, axis=2)[..., zero + copy :]
        share_GSEK = jax.nn.softmax(logits_GSEK, axis=-1)
        scale_GS = scale_GS + jnp.sum(gate_GSE * share_GSEK[..., 0], axis=-1)
        weight_GSE = added_GSE * share_GSEK[..., 1]
        added_GSD = self.rules.einsum("GSE,ED->GSD", weight_GSE, self.rules.whole(self.vector_ED[...]))
        return scale_GS[..., None] * x_GSD + added_GSD


def combine(
    free: FreeExperts, x_GSD: jax.Array, decision: TokenChoice, y_GSD: jax.Array, kept_GSK: jax.Array, renormalise: bool
) -> tuple[Float[Array, "G S D"], Bool[Array, "G S K"]]:
    """The feed-forward experts' output y with the free experts' added, in the dtype of x, and all that was kept.

    renormalise: divide by the sum of the gates that were kept; y then comes without.
    """
    kept_GSK = kept_GSK | free.chosen(decision)
    total_GSD = y_GSD.astype(jnp.float32) + free(x_GSD, decision)
    if renormalise:
        sum_GS1 = jnp.sum(jnp.where(kept_GSK, decision.gate_GSK, 0.0), axis=-1, keepdims=True)
        total_GSD = total_GSD / jnp.where(sum_GS1 > 0, sum_GS1, 1.0)
    return total_GSD.astype(x_GSD.dtype), kept_GSK
