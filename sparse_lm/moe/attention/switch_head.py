"""SwitchHead: ordinary heads whose values and outputs are small mixtures of experts, chosen per head by sigmoids."""

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
    attention_stats,
    merge,
    whole_experts,
)
from sparse_lm.moe.config import BalanceConfig
from sparse_lm.moe.routers import RouterShape
from sparse_lm.moe.routers.base import LinearScores
from sparse_lm.moe.types import Scores, TokenChoice
from sparse_lm.nn.dropout import dropout, split_keys
from sparse_lm.nn.init import fan_in_normal
from sparse_lm.sharding import Rules

TINY = 1e-20  # keeps a root and a sum of scores away from 0


@dataclasses.dataclass(frozen=True)
class SwitchHead(AttentionExperts):
    """Each head has `num_experts` value and output projections, of which a token uses `top_k` each.

    v = sum_e s_e x W_v^e over the experts of the head with the highest s = sigmoid(x W_s), chosen by the token that is
    looked at; y = sum over heads of sum_e d_e (attention of the head) W_o^e with d = sigmoid(x W_d), chosen by the
    token that looks. Queries and keys are one dense projection per head. Scores do not compete, and are not
    renormalised.
    Source: Csordas et al. 2024 (2312.07987), equations 7 to 9, with experts in values and outputs only.
    balance: weights of the router losses; the paper has none. The load-balance loss is the mean over heads and both
        sides, 1 at perfect balance; z is the mean over them of the squared logsumexp of the logits.
    init_scale: of the experts' projections; router_scale: of the routers' weights; see `fan_in_normal`.
    """

    kind = "switch_head"

    num_experts: int = option(4, ge=1)
    top_k: int = option(2, ge=1)
    balance: BalanceConfig = BalanceConfig(load=0.0, z=0.0)
    init_scale: float = option(1.0, gt=0)
    router_scale: float = option(0.1, gt=0)

    def check(self) -> None:
        """Raises `ConfigError` when fields contradict each other."""
        if self.top_k > self.num_experts:
            raise ConfigError("top_k", self.top_k, f"must be at most num_experts={self.num_experts}")

    def check_shape(self, shape: AttentionShape) -> None:
        """See `AttentionExperts.check_shape`."""
        if shape.kv_heads != shape.num_heads:
            raise ConfigError(
                "num_kv_heads",
                shape.kv_heads,
                f"every head of switch_head has its own keys and values; leave it at None, or num_heads "
                f"({shape.num_heads})",
            )

    def names(self, num_heads: int) -> tuple[str, ...]:
        """See `AttentionExperts.names`: those of each head for values, then those of each head for outputs."""
        pairs = [(head, expert) for head in range(num_heads) for expert in range(self.num_experts)]
        return tuple(f"{side} {head}.{expert}" for side in ("value", "output") for head, expert in pairs)

    def build(self, key: jax.Array, shape: AttentionShape, rules: Rules) -> ExpertAttention:
        """See `AttentionExperts.build`."""
        return SwitchHeadAttention(key, self, shape, rules)

    def cost(self, shape: AttentionShape) -> AttentionCost:
        """See `AttentionExperts.cost`."""
        one = shape.d_model * shape.num_heads * shape.head_dim
        routers = 2 * shape.d_model * shape.num_heads * self.num_experts
        active = 2 * one + 2 * self.top_k * one + routers
        return AttentionCost(2 * one + 2 * self.num_experts * one + routers, active, active, routers)


class SwitchHeadAttention(ExpertAttention):
    """Every axis H here is all heads; statistics count an expert of a head, for values and then for outputs, as one."""

    def __init__(self, key: jax.Array, config: SwitchHead, shape: AttentionShape, rules: Rules):
        self.config, self.shape, self.rules = config, shape, rules
        query, key_, value, out, sources, targets = jax.random.split(key, 6)
        d_model, heads, width = shape.d_model, shape.num_heads, shape.head_dim
        experts, scale = config.num_experts, config.init_scale
        scores = RouterShape(d_model, heads * experts, config.top_k)
        self.value_scores = LinearScores(sources, scores, config.router_scale, rules)
        self.out_scores = LinearScores(targets, scores, config.router_scale, rules)
        self.query_DHI = nnx.Param(fan_in_normal(query, (d_model, heads, width), d_model))
        self.key_DHI = nnx.Param(fan_in_normal(key_, (d_model, heads, width), d_model))
        self.value_EDHI = nnx.Param(fan_in_normal(value, (experts, d_model, heads, width), d_model, scale))
        self.out_EHID = nnx.Param(fan_in_normal(out, (experts, heads, width, d_model), heads * width, scale))

    def __call__(self, x_BLD, inputs, key=None, cache=None):
        """See `ExpertAttention`."""
        rules, shape, dtype = self.rules, self.shape, x_BLD.dtype
        weights_key, out_key = split_keys(key, 2)
        sides = [self._route(scores, x_BLD, inputs.real_BL) for scores in (self.value_scores, self.out_scores)]
        value_gate_BLHE, out_gate_BLHE = (self._by_expert(decision) for decision, _ in sides)

        query_BLHI = rules.einsum("BLD,DHI->BLHI", x_BLD, rules.gather(self.query_DHI[...], "DHI", dtype))
        key_BLHI = rules.einsum("BLD,DHI->BLHI", x_BLD, rules.gather(self.key_DHI[...], "DHI", dtype))
        all_BLEHI = rules.einsum("BLD,EDHI->BLEHI", x_BLD, whole_experts(rules, self.value_EDHI[...], "EDHI", dtype))
        value_BLHI = merge(value_gate_BLHE, all_BLEHI, "BLHE,BLEHI->BLHI", rules)
        mixed_BLHI, stored = shape.heads(rules).mix(
            (query_BLHI, key_BLHI, value_BLHI), inputs.positions_BL, inputs.sight, weights_key, cache
        )
        mixed_BLEHI = merge(out_gate_BLHE, mixed_BLHI, "BLHE,BLHI->BLEHI", rules)
        y_BLD = rules.einsum("BLEHI,EHID->BLD", mixed_BLEHI, whole_experts(rules, self.out_EHID[...], "EHID", dtype))
        stats = attention_stats(*self._joined(sides), inputs, rules)
        return dropout(y_BLD, shape.dropout_rate, out_key), stored, stats

    def _route(self, scores: LinearScores, x_BLD, real_BL) -> tuple[TokenChoice, Scores]:
        """The choice of one side: K experts of each head, numbered head * E + expert, head by head."""
        heads, experts, top_k = self.shape.num_heads, self.config.num_experts, self.config.top_k
        logits = scores(x_BLD, 0.0, None)
        batch, length = real_BL.shape
        # Heads are on every device here, whatever is cut elsewhere: the scores are small.
        logits = self.rules.reshape(logits, (batch, length, heads, experts), "BL..")
        score = jax.nn.sigmoid(logits)
        expert = jax.lax.top_k(logits, top_k)[1]
        gate = jnp.take_along_axis(score, expert, axis=-1)
        expert = expert + experts * jnp.arange(heads, dtype=expert.dtype)[:, None]
        share = score / (heads * (jnp.sum(score, axis=-1, keepdims=True) + TINY))
        square_BL = jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)), axis=-1)

        def flat(x):
            return self.rules.reshape(x, (batch, length, x.shape[2] * x.shape[3]), "BL.")

        decision = TokenChoice(
            expert_GSK=jnp.where(real_BL[..., None], flat(expert), -1).astype(jnp.int32),
            gate_GSK=jnp.where(real_BL[..., None], flat(gate), 0.0),
        )
        return decision, Scores(flat(share), jnp.sqrt(square_BL + TINY))

    def _by_expert(self, decision: TokenChoice) -> jax.Array:
        """The gate of every expert of every head, 0 for those that were not chosen; cut along heads."""
        heads, experts, top_k = self.shape.num_heads, self.config.num_experts, self.config.top_k
        shape = (*decision.expert_GSK.shape[:2], heads, top_k)
        gate_BLHK = self.rules.reshape(decision.gate_GSK, shape, "BL..")
        expert_BLHK = self.rules.reshape(decision.expert_GSK, shape, "BL..")
        # Padding has gate 0, and so any expert will do.
        chosen_BLHKE = jax.nn.one_hot(expert_BLHK % experts, experts, dtype=jnp.float32)
        return self.rules.constrain(jnp.sum(gate_BLHK[..., None] * chosen_BLHKE, axis=3), "BLHE")

    def _joined(self, sides: list[tuple[TokenChoice, Scores]]) -> tuple[TokenChoice, Scores]:
        """Both sides as one choice among twice as many experts, of whose probabilities each side has half."""
        (values, value_scores), (outs, out_scores) = sides
        offset = self.shape.num_heads * self.config.num_experts
        expert = jnp.where(outs.expert_GSK >= 0, outs.expert_GSK + offset, -1)
        squares = jnp.square(value_scores.logsumexp_GS) + jnp.square(out_scores.logsumexp_GS)
        return TokenChoice(
            jnp.concatenate([values.expert_GSK, expert], axis=-1),
            jnp.concatenate([values.gate_GSK, outs.gate_GSK], axis=-1),
        ), Scores(
            jnp.concatenate([value_scores.probability_GSE, out_scores.probability_GSE], axis=-1) / 2,
            jnp.sqrt(squares / 2),
        )
