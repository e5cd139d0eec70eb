"""Soft MoE: every slot holds a mixture of all tokens of its group (arXiv 2308.00951)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm.config import ConfigError, option
from sparse_lm.moe.routers.base import Router, RouterConfig, RouterShape
from sparse_lm.moe.types import RouterInputs, Scores, Soft
from sparse_lm.nn.init import fan_in_normal
from sparse_lm.sharding import Rules

TINY = 1e-6  # keeps the length of a zero vector away from 0


@dataclasses.dataclass(frozen=True)
class SoftMixture(RouterConfig):
    """Options of Soft MoE.

    Slot p of expert e has a vector phi; logits are the cosine of token and vector times a learned scale. A slot's input
    is the mean of the tokens weighted by a softmax over the tokens; a token's output is the mean of the slots' outputs
    weighted by a softmax over all slots (equations 1 to 3 and section 2.3). Nothing is chosen and nothing is dropped.

    scale: where the learned scale starts; 1 in the paper.

    Conventions: an expert has ceil(capacity_factor * top_k * group_size / num_experts) slots, so that with
    capacity_factor=1 a token costs as much as with top_k experts. The vectors belong to slots, so training and
    evaluation have the same capacity, and group_size has to be set. Statistics count every token with every expert;
    probabilities are a token's weights summed over the slots of an expert. A load-balance loss is then the constant 1:
    set `balance.load=0`. Padding takes no part in a slot.
    """

    kind = "soft"
    causal = False
    needs_slots = True
    fixed_slots = True
    dispatchers = ("einsum",)

    scale: float = option(1.0, gt=0)

    def check_shape(self, shape: RouterShape) -> None:
        """Refuses a layer whose groups are of no set size: there would be no number of slots."""
        if shape.slots is None:
            raise ConfigError(
                "kind", self.kind, "a slot has weights, so the number of slots is set: set moe.group_size"
            )

    def build(self, key: jax.Array, shape: RouterShape, rules: Rules) -> SoftRouter:
        """See `RouterConfig.build`."""
        return SoftRouter(key, self, shape, rules)


class SoftRouter(Router):
    """Mixes tokens into slots and slots into tokens."""

    def __init__(self, key: jax.Array, config: SoftMixture, shape: RouterShape, rules: Rules):
        assert shape.slots is not None
        self.rules = rules
        self.phi_DEC = nnx.Param(fan_in_normal(key, (shape.d_model, shape.num_experts, shape.slots), shape.d_model))
        self.scale = nnx.Param(jnp.asarray(config.scale, jnp.float32))

    def __call__(  # type: ignore[override]
        self, inputs: RouterInputs, key: jax.Array | None
    ) -> tuple[Soft, Scores]:
        """See `Router`. There is no noise: training and evaluation mix alike."""
        rules, mask_GS11 = self.rules, inputs.mask_GS[..., None, None]
        phi_DEC = rules.whole(self.phi_DEC[...])
        unit_DEC = phi_DEC / (jnp.linalg.norm(phi_DEC, axis=0, keepdims=True) + TINY)
        x_GSD = inputs.x_GSD.astype(jnp.float32)
        unit_GSD = x_GSD / (jnp.sqrt(jnp.sum(jnp.square(x_GSD), axis=-1, keepdims=True) + TINY**2) + TINY)
        logits_GSEC = rules.einsum("GSD,DEC->GSEC", unit_GSD, unit_DEC) * rules.whole(self.scale[...])
        groups, size, num_experts, slots = logits_GSEC.shape
        # A finite floor instead of -inf: a group of padding alone stays free of NaN.
        among_GSEC = jnp.where(mask_GS11, logits_GSEC, jnp.finfo(jnp.float32).min)
        flat_GSX = rules.reshape(logits_GSEC, (groups, size, num_experts * slots), "GS.")
        combine_GSEC = rules.reshape(jax.nn.softmax(flat_GSX, axis=-1), logits_GSEC.shape, "GS..")
        decision = Soft(
            dispatch_GSEC=jnp.where(mask_GS11, jax.nn.softmax(among_GSEC, axis=1), 0.0),
            combine_GSEC=jnp.where(mask_GS11, combine_GSEC, 0.0),
        )
        return decision, Scores(jnp.sum(combine_GSEC, axis=-1), jax.nn.logsumexp(flat_GSX, axis=-1))
