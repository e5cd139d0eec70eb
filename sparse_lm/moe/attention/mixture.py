"""Mixture of attention heads: experts with their own queries and outputs over shared keys and values (MoA, JetMoE)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm.config import ConfigError, option
from sparse_lm.moe.attention.base import (
    AttentionCost,
    AttentionExperts,
    AttentionShape,
    ExpertAttention,
    as_groups,
    attention_stats,
    merge,
    whole_experts,
)
from sparse_lm.moe.config import BalanceConfig
from sparse_lm.moe.routers import ROUTERS, RouterConfig, RouterShape
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.moe.types import RouterInputs
from sparse_lm.nn.dropout import dropout, split_keys
from sparse_lm.nn.init import fan_in_normal
from sparse_lm.sharding import Rules


@dataclasses.dataclass(frozen=True)
class Mixture(AttentionExperts):
    """Every token picks `top_k` of `num_experts` attention experts (Zhang et al. 2022, 2210.05144, section 3.2).

    An expert has queries and outputs for num_heads / top_k heads of its own; all experts share the keys and values of
    num_kv_heads heads. A token has num_heads query heads in all. y = sum_e gate_e * (attention of expert e) W_o^e.
    In JetMoE-8B (2404.07413) num_experts=8, top_k=2, num_heads=32, num_kv_heads=16; in MoA num_heads=top_k,
    num_kv_heads=1.
    router: any causal choice of experts by tokens, with a single row as its group; nothing is ever dropped. The default
        is JetMoE's softmax over the chosen logits.
    balance: weights of the router losses, once per layer; the defaults are JetMoE's.
    init_scale: of the experts' projections, see `fan_in_normal`.
    """

    kind = "mixture"

    num_experts: int = option(8, ge=1)
    top_k: int = option(2, ge=1)
    router: RouterConfig = option(TopK(gate="softmax_after"), variants=ROUTERS)
    balance: BalanceConfig = BalanceConfig()
    init_scale: float = option(1.0, gt=0)

    def check(self) -> None:
        """Raises `ConfigError` when fields contradict each other."""
        if self.top_k > self.num_experts:
            raise ConfigError("top_k", self.top_k, f"must be at most num_experts={self.num_experts}")
        if not self.router.causal or self.router.needs_slots:
            raise ConfigError(
                "router.kind",
                self.router.kind,
                "lets later tokens of a row decide which heads earlier ones get; choose a causal router, such as top_k",
            )
        if self.router.pathway:
            raise ConfigError(
                "router.pathway", True, "only routers of feed-forward layers hand their logits on; use False"
            )
        if getattr(self.router, "gate_on", "output") != "output":
            raise ConfigError(
                "router.gate_on", "input", "an attention expert has no input to scale but its queries; use output"
            )
        try:
            self.router.check_shape(RouterShape(1, self.num_experts, self.top_k))
        except ConfigError as error:
            raise error.under("router") from None

    def check_shape(self, shape: AttentionShape) -> None:
        """See `AttentionExperts.check_shape`."""
        if shape.num_heads % (self.top_k * shape.kv_heads):
            raise ConfigError(
                "num_heads",
                shape.num_heads,
                f"must be a multiple of attention.top_k * num_kv_heads = {self.top_k} * {shape.kv_heads}: each of a "
                f"token's {self.top_k} experts has num_heads / top_k query heads over the shared key/value heads; for "
                "one query head per key/value head set num_kv_heads = num_heads / top_k",
            )

    @property
    def losses(self) -> BalanceConfig:
        """See `AttentionExperts.losses`."""
        return self.balance.reaching(self.router)

    def build(self, key: jax.Array, shape: AttentionShape, rules: Rules) -> ExpertAttention:
        """See `AttentionExperts.build`."""
        return MixtureAttention(key, self, shape, rules)

    def cost(self, shape: AttentionShape) -> AttentionCost:
        """See `AttentionExperts.cost`."""
        one_head = shape.d_model * shape.head_dim
        shared, active = 2 * shape.kv_heads * one_head, 2 * shape.num_heads * one_head
        total = active // self.top_k * self.num_experts
        router_shape = RouterShape(shape.d_model, self.num_experts, self.top_k)
        router, multiplied = self.router.parameters(router_shape)
        return AttentionCost(total + shared + router, active + shared + router, active + shared + multiplied, router)


class MixtureAttention(ExpertAttention):
    """H is the query heads of an expert here, J the shared key/value heads, K the experts of a token."""

    def __init__(self, key: jax.Array, config: Mixture, shape: AttentionShape, rules: Rules):
        router, query, key_, value, out = jax.random.split(key, 5)
        self.config, self.shape, self.rules = config, shape, rules
        width, heads = shape.head_dim, shape.num_heads // config.top_k
        experts, scale, d_model = config.num_experts, config.init_scale, shape.d_model
        self.router = config.router.build(router, RouterShape(d_model, experts, config.top_k), rules)
        self.query_EDHI = nnx.Param(fan_in_normal(query, (experts, d_model, heads, width), d_model, scale))
        self.key_DJI = nnx.Param(fan_in_normal(key_, (d_model, shape.kv_heads, width), d_model))
        self.value_DJI = nnx.Param(fan_in_normal(value, (d_model, shape.kv_heads, width), d_model))
        self.out_EHID = nnx.Param(fan_in_normal(out, (experts, heads, width, d_model), heads * width, scale))

    def __call__(self, x_BLD, inputs, key=None, cache=None):
        """See `ExpertAttention`."""
        rules, shape, dtype = self.rules, self.shape, x_BLD.dtype
        router_key, weights_key, out_key = split_keys(key, 3)
        # Nothing is dropped, so that every expert has room for a whole row.
        room = inputs.real_BL.shape[1]
        asked = RouterInputs(x_BLD, inputs.real_BL, inputs.ids_BL, room, inputs.previous_BL)
        decision, scores = self.router(as_groups(asked, rules), router_key)
        expert_BLK = rules.constrain(decision.expert_GSK, "BL.")
        chosen_BLKE = jax.nn.one_hot(expert_BLK, self.config.num_experts, dtype=jnp.float32)
        gate_BLK = self._gates(rules.constrain(decision.gate_GSK, "BL."))

        all_BLEHI = rules.einsum("BLD,EDHI->BLEHI", x_BLD, whole_experts(rules, self.query_EDHI[...], "EDHI", dtype))
        query_BLHKI = merge(chosen_BLKE, all_BLEHI, "BLKE,BLEHI->BLHKI", rules)
        batch, length, heads, choices, width = query_BLHKI.shape
        # Heads stay in front of choices: a cut along heads is then one along the key/value heads that they look at.
        query_BLHI = rules.reshape(query_BLHKI, (batch, length, heads * choices, width), "BLHI")
        key_BTJI = rules.einsum("BTD,DJI->BTJI", x_BLD, rules.gather(self.key_DJI[...], "DJI", dtype))
        value_BTJI = rules.einsum("BTD,DJI->BTJI", x_BLD, rules.gather(self.value_DJI[...], "DJI", dtype))
        mixed_BLHI, stored = shape.heads(rules).mix(
            (query_BLHI, key_BTJI, value_BTJI), inputs.positions_BL, inputs.sight, weights_key, cache
        )
        mixed_BLHKI = rules.reshape(mixed_BLHI, (batch, length, heads, choices, width), "BLHKI")
        gated_BLKE = gate_BLK[..., None] * chosen_BLKE
        mixed_BLEHI = merge(gated_BLKE, mixed_BLHKI, "BLKE,BLHKI->BLEHI", rules)
        y_BLD = rules.einsum("BLEHI,EHID->BLD", mixed_BLEHI, whole_experts(rules, self.out_EHID[...], "EHID", dtype))
        stats = attention_stats(decision, scores, inputs, rules)
        return dropout(y_BLD, shape.dropout_rate, out_key), stored, stats

    def with_updated_router(self, stats):
        """See `ExpertAttention.with_updated_router`."""
        new = jax.tree.map(lambda leaf: leaf, self)
        new.router = self.router.updated(stats.router)
        return new

    def _gates(self, gate_BLK: jax.Array) -> jax.Array:
        """Gates as the router gave them; made to sum to 1 over what was kept, which is all, where it asks for that."""
        if getattr(self.config.router, "renormalise", "none") != "after_drop":
            return gate_BLK
        total_BL1 = jnp.sum(gate_BLK, axis=-1, keepdims=True)
        return gate_BLK / jnp.where(total_BL1 > 0, total_BL1, 1.0)
